"""Type checkers and editors see the signatures that the layers have."""

import ast

import pytest

from tests import stubs

pytestmark = pytest.mark.any_backend


def test_stubs_are_the_composed_signatures():
    written = stubs.PATH.read_text()
    if f"Keras {stubs.keras_version()}," not in written:
        pytest.skip("The stubs were written with another version of Keras.")
    assert ast.dump(ast.parse(written)) == ast.dump(ast.parse(stubs.text())), "Run `python -m tests.stubs`."
