"""Warnings name the line of the user's code, not one of Keras or of this package."""

import contextlib
import inspect

import keras
import numpy as np
import pytest
from keras import layers

import keras_vdrop as kv

X = np.ones((8, 3), "float32")


@contextlib.contextmanager
def warns_of_next_line(text):
    """Expect a warning that contains `text` and names the line after the `with` statement."""
    with pytest.warns() as record:
        yield
    line = inspect.currentframe().f_back.f_back.f_lineno + 1
    assert {(each.filename, each.lineno) for each in record if text in str(each.message)} == {(__file__, line)}


def regression(*stack, **options):
    model = keras.Sequential([keras.Input((3,)), *stack, kv.VariationalDense(1, **options)])
    model.compile("sgd", "mse")
    return model


def test_of_the_first_call_in_fit():
    model = regression()
    with warns_of_next_line("not the ELBO"):
        model.fit(X, X[:, :1], verbose=0)


def test_of_a_callback():
    model = regression(kl_weight=0.5)
    with warns_of_next_line("pass `temperature` to `ELBO`"):
        model.fit(X, X[:, :1], verbose=0, callbacks=[kv.ELBO(len(X))])


def test_of_a_constructor():
    model = regression(layers.Dropout(0.5))
    with warns_of_next_line("stays off in `MonteCarlo`"):
        kv.MonteCarlo(model, 2)


def test_of_predict():
    sampler = kv.MonteCarlo(regression(), 2)
    with warns_of_next_line("NaN or infinity"):
        sampler.predict(X * np.nan, verbose=0)


def test_of_a_function():
    model = regression()
    with warns_of_next_line("No weights are kept"):
        kv.prune(model, threshold=-1e9)
