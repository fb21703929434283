"""What is said of an output before there is data is true of it."""

import keras
import pytest

from tests.cases import array


@pytest.mark.parametrize("training", [False, True])
def test_symbolic_shape_equals_eager_shape(case, training):
    layer = case.make()
    symbolic = layer(keras.Input(case.shape[1:]), training=training)
    eager = layer(case.inputs(), training=training)
    assert symbolic.shape[1:] == tuple(eager.shape)[1:]
    assert symbolic.dtype == keras.backend.standardize_dtype(eager.dtype)
    assert layer.compute_output_shape(case.shape) == tuple(eager.shape)


def test_batch_size_may_change(case):
    layer = case.make()
    assert len(array(layer(case.inputs()))) != 1
    assert len(array(layer(case.inputs()[:1], training=True))) == 1
