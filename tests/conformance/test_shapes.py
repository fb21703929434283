"""The symbolic shape and dtype of an output are those of the eager output."""

import keras
import pytest

from tests.cases import array


@pytest.mark.parametrize("training", [False, True])
def test_symbolic_shape_equals_eager_shape(case, training):
    layer = case.make()
    symbolic = case.call(layer, case.input(), training=training)
    eager = case.call(layer, case.inputs(), training=training)
    assert symbolic.shape[1:] == tuple(eager.shape)[1:]
    assert symbolic.dtype == keras.backend.standardize_dtype(eager.dtype)
    shapes = [case.shape] * (2 if case.is_attention else 1)
    computed = layer.compute_output_shape(*shapes)
    assert all(said in (None, true) for said, true in zip(computed, eager.shape, strict=True))


def test_batch_size_may_change(case):
    layer = case.make()
    assert len(array(case.call(layer, case.inputs()))) != 1
    assert len(array(case.call(layer, case.inputs()[:1], training=True))) == 1
