"""The loss contains the KL and its gradient exactly once, however the layer is called."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_vdrop as kv
from tests.cases import CASES, array, posteriors, randomize, rates

WEIGHT = 0.01


def alone(case):
    return case.model()


def called_twice(case):
    x, layer = case.input(), case.make()
    return keras.Model(x, layers.Add()([case.call(layer, x), case.call(layer, x + x)]))


def time_distributed(case):
    x = case.input((len(case.shape), 3, *case.shape[1:]))
    return keras.Model(x, layers.TimeDistributed(case.make())(x))


def nested(case):
    x = case.input()
    return keras.Model(x, keras.Sequential([case.model()])(x))


def rematerialised(case):
    with keras.RematScope(mode="full"):
        layer = case.make()
    return case.model(layer)


def bidirectional(case):
    return keras.Sequential([case.input(), layers.Bidirectional(case.make(go_backwards=False))])


def stacked(case):
    rest = {"units": 3, "kl_weight": WEIGHT, "kernel_prior": "ard"}
    cells = [case.cls(**{**case.keras, **case.ours, **rest}) for _ in range(2)]
    return keras.Sequential([case.input(), layers.RNN(cells)])


SUBJECTS = [case for case in CASES if case.has_kl]
SETTINGS = [(case, setting) for case in SUBJECTS for setting in (alone, nested)]
# `called_twice` doubles the input, which can push indices beyond the embedding table.
SETTINGS += [(case, called_twice) for case in SUBJECTS if not case.vocabulary]
# TimeDistributed passes only one input on, and attention needs two.
SETTINGS += [(case, time_distributed) for case in SUBJECTS if not case.is_attention]
SETTINGS += [(case, bidirectional) for case in SUBJECTS if case.is_rnn]
SETTINGS += [(case, stacked) for case in SUBJECTS if case.is_cell]
# `keras.layers.RNN` does not run in a RematScope. In TensorFlow neither does the Dense layer that our wrappers wrap.
SETTINGS += [(case, rematerialised) for case in SUBJECTS if not (case.is_rnn or case.is_cell or case.is_wrapper)]


def closed_form(case):
    """Return the case with ARD priors, whose KL and gradient have a closed form."""
    return case.with_prior("ard").replace(kl_weight=WEIGHT)


def expected_kl(model):
    """Compute Σ weight·KL over the model's posteriors in NumPy.

    The KL of a weight is ½·log(1 + loc²/variance). `expected_rate_kl` computes that of a dropout rate.
    """
    kl = [0.5 * np.log1p(array(w.loc) ** 2 * np.exp(-array(w.log_variance))).sum() for w in posteriors(model)]
    return WEIGHT * (sum(kl) + sum(expected_rate_kl(posterior) for posterior in rates(model)))


def expected_rate_kl(posterior):
    rate, kernel = float(array(posterior.owner.rate)), array(posterior.kernel)
    entropy = -rate * np.log(rate) - (1 - rate) * np.log(1 - rate)
    decay = (kernel**2).sum() / (2 * posterior.owner.prior_scale**2 * (1 - rate))
    return decay + posterior.size * (np.log(2) - entropy)


@pytest.mark.parametrize("subject, setting", SETTINGS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_kl_is_counted_once(subject, setting):
    model = setting(closed_form(subject))
    randomize(model)
    total = sum(float(array(loss)) for loss in model.losses)
    np.testing.assert_allclose(total, expected_kl(model), rtol=1e-4)

    # The data loss is 0, so the loss that Keras reports and minimises is the KL.
    # Only `alone` runs compiled, which is enough. Eager steps take a third of the time.
    eager = setting is not alone
    model.compile(keras.optimizers.SGD(1.0), lambda y, prediction: 0.0 * keras.ops.sum(prediction), run_eagerly=eager)
    x = subject.inputs(shape=(3, *model.input_shape[1:]))
    y = np.zeros((len(x), *model.output_shape[1:]), "float32")
    before = [(array(w.loc), array(w.log_variance)) for w in posteriors(model)]
    rates_before = [(float(array(p.owner.rate_logit)), array(p.kernel)) for p in rates(model)]
    np.testing.assert_allclose(model.train_on_batch(x, y), total, rtol=1e-4)
    for weight, (loc, log_variance) in zip(posteriors(model), before):
        ratio = loc**2 * np.exp(-log_variance)
        by_loc = WEIGHT * loc * np.exp(-log_variance) / (1 + ratio) * weight.loc.trainable
        by_log_variance = -0.5 * WEIGHT * ratio / (1 + ratio) * weight.log_variance.factor**2
        if log_variance.shape == (1,) != loc.shape:  # one log variance for all weights
            by_log_variance = by_log_variance.sum()
        np.testing.assert_allclose(loc - array(weight.loc), by_loc, atol=2e-6)
        np.testing.assert_allclose(log_variance - array(weight.log_variance), by_log_variance, atol=2e-6)
    for posterior, (logit, kernel) in zip(rates(model), rates_before):
        rate, precision = 1 / (1 + np.exp(-logit)), posterior.owner.prior_scale**-2
        by_kernel = WEIGHT * precision * kernel / (1 - rate)
        by_logit = 0.5 * precision * (kernel**2).sum() * np.exp(logit) + posterior.size * logit * rate * (1 - rate)
        np.testing.assert_allclose(kernel - array(posterior.kernel), by_kernel, atol=2e-6)
        np.testing.assert_allclose(logit - array(posterior.owner.rate_logit), WEIGHT * by_logit, atol=2e-6)


def test_frozen_layer_has_no_kl(case):
    model = alone(case)
    model.trainable = False
    assert sum(float(array(loss)) for loss in model.losses) == 0.0


@pytest.mark.parametrize("frozen", ["loc", "log_variance"])
@pytest.mark.parametrize("subject", [case for case in CASES if case.is_kernel], ids=str)
def test_half_frozen_posterior_keeps_its_kl(subject, frozen):
    model = alone(closed_form(subject))
    randomize(model)
    for weight in posteriors(model):
        getattr(weight, frozen).trainable = False
    total = sum(float(array(loss)) for loss in model.losses)
    np.testing.assert_allclose(total, expected_kl(model), rtol=1e-4)


@pytest.mark.parametrize("subject", [case for case in CASES if case.is_kernel], ids=str)
def test_pruned_weights_have_no_kl(subject):
    """Under N(0, s²) a weight of mean 0 still has a KL through its variance, which only the mask removes."""
    scale = 0.5
    model = alone(subject.with_prior(kv.priors.Normal(scale)).replace(kl_weight=WEIGHT))
    randomize(model)
    rng, expected = np.random.default_rng(1), 0.0
    for weight in posteriors(model):
        left = rng.uniform(size=weight.shape) < 0.5
        weight.mask.assign(left)
        weight.loc.assign(weight.mean())
        if weight.prior.get_config() == kv.priors.Normal(scale).get_config():
            ratio = np.exp(array(weight.log_variance)) / scale**2
            kl = 0.5 * (ratio + (array(weight.loc) / scale) ** 2 - 1.0 - np.log(ratio))
        else:  # a bias, which has another prior
            kl = array(weight.prior.kl(array(weight.loc), array(weight.log_variance)))
        expected += (kl * left).sum()
    np.testing.assert_allclose(float(array(kv.kl_divergence(model))), expected, rtol=1e-4)
    np.testing.assert_allclose(sum(float(array(loss)) for loss in model.losses), WEIGHT * expected, rtol=1e-4)


# The name of the regularized weight of each layer family, if it is not `kernel`.
REGULARIZED = {"depthwise": "kernel", "separable": "depthwise_kernel", "embedding": "embeddings"}


@pytest.mark.parametrize("subject", [case for case in CASES if case.is_kernel and not case.is_attention], ids=str)
def test_user_regularizer_is_added(subject):
    family = subject.name.split("_")[0]
    weight_name = REGULARIZED.get(family, "kernel")
    argument = {"depthwise": "depthwise", "separable": "depthwise", "embedding": "embeddings"}.get(family, "kernel")
    layer = closed_form(subject).built(**{f"{argument}_regularizer": keras.regularizers.L2(0.5)})
    total = sum(float(array(loss)) for loss in layer.losses)
    weight = getattr(getattr(layer, "cell", layer), weight_name)
    np.testing.assert_allclose(total, expected_kl(layer) + 0.5 * float((array(weight.loc) ** 2).sum()), rtol=1e-4)
