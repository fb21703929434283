"""Without a KL weight a model trains with the average KL, and one warning says that this is not the ELBO."""

import warnings

import keras
import numpy as np
import pytest

import keras_vdrop as kv
from keras_vdrop.posterior import posteriors
from tests.cases import CASES, array

SUBJECTS = pytest.mark.parametrize("subject", [case for case in CASES if case.has_kl], ids=str)


def messages(action):
    """Run `action` and return the messages of its warnings about an unset KL weight."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught if "not the ELBO" in str(w.message)]


def fit(model, case, eager=False, **arguments):
    model.compile("sgd", "mse", run_eagerly=eager)
    x = case.inputs()
    y = np.ones((len(x), *model.output_shape[1:]), "float32")
    return messages(lambda: model.fit(x, y, verbose=0, **arguments))


def call(model, case):
    """Call the model in training mode, without compiling it, and return the messages."""
    return messages(lambda: model(case.inputs(), training=True))


@SUBJECTS
def test_unset_weight_warns_once_and_says_what_to_write(subject):
    both = keras.Sequential([subject.input(), keras.layers.Identity(), subject.model(kl_weight=None)])
    (message,) = fit(both, subject, eager=True, epochs=2)
    assert "keras_vdrop.ELBO(num_examples=" in message and "kl_weight=1 / len(" in message
    assert not call(both, subject)
    # A model made later warns again.
    assert len(call(subject.model(kl_weight=None), subject)) == 1


@SUBJECTS
def test_unset_weight_averages_over_the_layers_weights(subject):
    layer = subject.built(kl_weight=None)
    of_layer = {}
    for posterior in posteriors(layer):
        of_layer.setdefault(id(posterior.owner), []).append(posterior)
    expected = sum(sum(float(p.kl()) for p in own) / sum(p.size for p in own) for own in of_layer.values())
    np.testing.assert_allclose(sum(float(array(loss)) for loss in layer.losses), expected, rtol=1e-5)


@SUBJECTS
def test_no_warning_where_it_is_set(subject):
    assert not call(subject.model(kl_weight=0.1), subject)
    assert not call(subject.model(kl_weight=0.0), subject)
    assert not fit(subject.model(kl_weight=None), subject, eager=True, callbacks=[kv.ELBO(10, labels_per_example=1.0)])
    layer = subject.make(kl_weight=None)
    model = subject.model(layer)
    getattr(layer, "cell", layer).kl_weight = 0.1
    assert not call(model, subject)
