"""Damaged and hostile files: a model loads as it was saved, or not at all."""

import keras
import numpy as np
import pytest

import keras_vdrop as kv
from tests.cases import array


@pytest.fixture
def saved(tmp_path):
    """Return a model, an input, and the path of its file."""
    model = keras.Sequential([keras.Input((3,)), kv.VariationalDense(4, kernel_prior="ard"), kv.VariationalDense(2)])
    kv.prune(model, -5.9)
    path = tmp_path / "model.keras"
    model.save(path)
    return model, np.ones((2, 3), "float32"), path


def assert_same_or_refused(content, model, x, path):
    path.write_bytes(content)
    try:
        again = keras.saving.load_model(path)
    except Exception:  # the type depends on the part of the file that is damaged
        return False
    np.testing.assert_array_equal(array(again(x)), array(model(x)))
    return True


def test_a_truncated_file_is_refused(saved):
    model, x, path = saved
    content = path.read_bytes()
    for size in np.linspace(0, len(content) - 1, 8, dtype=int):
        assert not assert_same_or_refused(content[:size], model, x, path)


def test_a_flipped_bit_changes_no_prediction(saved):
    """A bit that does not matter, such as one of a date, may be flipped; any other is noticed."""
    model, x, path = saved
    content, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for place in rng.integers(0, len(content), 40):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        refused += not assert_same_or_refused(bytes(damaged), model, x, path)
    assert refused > 20


@pytest.mark.parametrize(
    "prior",
    [
        {"module": "os", "class_name": "system", "config": {"command": "touch here"}, "registered_name": "system"},
        {"module": "builtins", "class_name": "eval", "config": "open('here', 'w')", "registered_name": None},
        {
            "module": "builtins",
            "class_name": "__lambda__",
            "config": {"value": "open('here', 'w')"},
            "registered_name": None,
        },
    ],
)
def test_nothing_in_a_config_is_executed(prior, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {**kv.VariationalDense(2).get_config(), "kernel_prior": prior}
    with pytest.raises((ValueError, TypeError)):
        kv.VariationalDense.from_config(config)
    assert not list(tmp_path.iterdir())
