"""Without a KL weight a model trains, by the average KL, and one warning says that this is not the ELBO."""

import warnings

import keras
import numpy as np

import keras_vdrop as kv
from tests.cases import array, posteriors


def fit(model, case, **arguments):
    model.compile("sgd", "mse")
    x = case.inputs()
    y = np.ones(model.compute_output_shape(x.shape), "float32")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, y, verbose=0, **arguments)
    return [str(w.message) for w in caught if "not the ELBO" in str(w.message)]


def test_unset_weight_warns_once_and_says_what_to_write(case):
    both = keras.Sequential([keras.Input(case.shape[1:]), keras.layers.Identity(), case.make(kl_weight=None)])
    (message,) = fit(both, case, epochs=2)
    assert "keras_vdrop.ELBO(num_examples=" in message and "kl_weight=1 / len(" in message
    assert not fit(both, case)
    # a model made later is told again
    assert len(fit(case.model(kl_weight=None), case)) == 1


def test_unset_weight_averages_over_the_layers_weights(case):
    layer = case.make(kl_weight=None)
    layer(case.inputs())
    weights = posteriors(layer)
    expected = sum(float(w.kl()) for w in weights) / sum(np.prod(w.shape) for w in weights)
    np.testing.assert_allclose(sum(float(array(loss)) for loss in layer.losses), expected, rtol=1e-5)


def test_no_warning_where_it_is_set(case):
    assert not fit(case.model(kl_weight=0.1), case)
    assert not fit(case.model(kl_weight=0.0), case)
    assert not fit(case.model(kl_weight=None), case, callbacks=[kv.ELBO(10)])
    layer = case.make(kl_weight=None)
    model = keras.Sequential([keras.Input(case.shape[1:]), layer])
    getattr(layer, "cell", layer).kl_weight = 0.1
    assert not fit(model, case)
