"""Over how many labels of an example a loss is a mean, and what `ELBO` makes of it."""

import keras
import numpy as np
import pytest
from keras import layers, losses

import keras_vdrop as kv
from keras_vdrop.objective import Output, labels_of, likelihood_factor, outputs_of
from tests.cases import array

LABELS = [
    ("sparse_categorical_crossentropy", (None, 10), 1),
    ("sparse_categorical_crossentropy", (None, 4, 5, 3), 20),
    (losses.SparseCategoricalCrossentropy(from_logits=True), (None, 4, 5, 3), 20),
    (losses.CategoricalCrossentropy(), (None, 7, 3), 7),
    (losses.CategoricalCrossentropy(axis=1), (None, 3, 7), 7),
    ("crossentropy", (None, 7, 3), 7),
    ("ce", (None, 7, 1), 7),
    (losses.BinaryCrossentropy(), (None, 6), 6),
    (losses.binary_crossentropy, (None, 4, 5, 1), 20),
    ("mse", (None, 1), 1),
    ("mse", (None, 5, 2), 10),
    (losses.Huber, (None, 5, 2), 10),
    (losses.Poisson(), (None, 5), 5),
    (losses.CTC(), (None, 9, 5), 1),
    (kv.losses.NormalNLL(), (None, None, 2), 1),
    (kv.losses.NormalNLL(), (None, 4, 6, 2), 1),
    (lambda y, prediction: prediction, (None, 1), 1),
    (lambda y, prediction: prediction, (None,), 1),
]


@pytest.mark.parametrize("loss, shape, labels", LABELS)
def test_labels(loss, shape, labels):
    assert labels_of(loss, Output("out", shape, masked=False)) == labels


class Own(losses.MeanSquaredError):
    def call(self, y_true, y_pred):
        return keras.ops.sum(y_pred, axis=-1)


UNKNOWN = [
    ("mse", (None, None, 2), False),
    ("sparse_categorical_crossentropy", (None, 7, 3), True),
    (losses.SparseCategoricalCrossentropy(ignore_class=0), (None, 7, 3), False),
    (lambda y, prediction: prediction, (None, 2), False),
    (Own(), (None, 2), False),
    (losses.Dice(), (None, 4, 4, 1), False),
    (losses.MeanSquaredError(reduction="sum"), (None, 1), False),
    (losses.MeanSquaredError(reduction=None), (None, 1), False),
    (losses.MeanSquaredError(reduction="mean_with_sample_weight"), (None, 1), False),
    (kv.losses.NormalNLL(reduction="sum"), (None, 2), False),
]


@pytest.mark.parametrize("loss, shape, masked", UNKNOWN)
def test_what_cannot_be_known_is_refused(loss, shape, masked):
    with pytest.raises(ValueError, match="labels_per_example"):
        labels_of(loss, Output("out", shape, masked))


TWO = [Output("a", (None, 8, 3), False), Output("b", (None, 2), False)]


@pytest.mark.parametrize(
    "loss, loss_weights, factor",
    [
        (["sparse_categorical_crossentropy", "mse"], [8, 2], 1),
        ({"a": "sparse_categorical_crossentropy", "b": "mse"}, {"a": 4, "b": 1}, 1 / 2),
        ({"b": "mse"}, None, 1 / 2),
        (["sparse_categorical_crossentropy", None], None, 1 / 8),
        (["sparse_categorical_crossentropy", "mse"], [1, 0], 1 / 8),
    ],
)
def test_the_factor_of_several_outputs(loss, loss_weights, factor):
    np.testing.assert_allclose(likelihood_factor(TWO, loss, loss_weights), factor)


def test_a_scale_of_one_output_of_several():
    loss = {"a": "sparse_categorical_crossentropy", "b": "mse"}
    weights = {"a": 8, "b": 2 / (2 * 0.1**2)}
    np.testing.assert_allclose(likelihood_factor(TWO, loss, weights, likelihood_scale=0.1), 1)
    with pytest.raises(ValueError, match=r"'a': 8.0, 'b': 100.0"):
        likelihood_factor(TWO, loss, None, likelihood_scale=0.1)
    with pytest.raises(ValueError, match=r"likelihood_scale=0.1"):
        likelihood_factor(TWO[:1], "sparse_categorical_crossentropy", None, likelihood_scale=0.1)


def test_heads_of_different_sizes_are_no_likelihood():
    with pytest.raises(ValueError, match=r"loss_weights=\{'a': 8.0, 'b': 2.0\}"):
        likelihood_factor(TWO, ["sparse_categorical_crossentropy", "mse"])


def test_masks_are_seen():
    tokens = keras.Input((5,), dtype="int32")
    table = layers.Embedding(7, 3, mask_zero=True)
    assert outputs_of(table(tokens))[0].masked
    assert not outputs_of(layers.Flatten()(layers.Embedding(7, 3)(tokens)))[0].masked


RNG = np.random.default_rng(0)
N = 10


def dense(units, **arguments):
    return kv.VariationalDense(units, initial_log_variance=-4.0, **arguments)


def segmentation():
    model = keras.Sequential([keras.Input((4, 4, 1)), kv.VariationalConv2D(3, 3, padding="same")])
    y = RNG.integers(0, 3, (N, 4, 4))
    return model, RNG.normal(size=(N, 4, 4, 1)), y, losses.SparseCategoricalCrossentropy(from_logits=True), crossentropy


def tagging():
    model = keras.Sequential([keras.Input((6, 4)), dense(3)])
    y = np.eye(3)[RNG.integers(0, 3, (N, 6))]
    loss = losses.CategoricalCrossentropy(from_logits=True)
    return model, RNG.normal(size=(N, 6, 4)), y, loss, lambda y, f: crossentropy(y.argmax(-1), f)


def labels():
    model = keras.Sequential([keras.Input((4,)), dense(5)])
    y = RNG.integers(0, 2, (N, 5))
    return model, RNG.normal(size=(N, 4)), y, losses.BinaryCrossentropy(from_logits=True), binary


def steps():
    model = keras.Sequential([keras.Input((6, 4)), dense(2)])
    return model, RNG.normal(size=(N, 6, 4)), RNG.normal(size=(N, 6, 2)), "mse", lambda y, f: np.sum((y - f) ** 2)


def distribution():
    model = keras.Sequential([keras.Input((6, 4)), dense(2)])
    loss = kv.losses.NormalNLL()

    def nll(y, f):
        scale = np.log1p(np.exp(f[..., 1])) + 1e-3
        return np.sum(0.5 * np.log(2 * np.pi) + np.log(scale) + 0.5 * ((y - f[..., 0]) / scale) ** 2)

    return model, RNG.normal(size=(N, 6, 4)), RNG.normal(size=(N, 6)), loss, nll


def crossentropy(y, logits):
    logits = np.asarray(logits, "float64")
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, y[..., None], -1).sum()


def binary(y, logits):
    logits = np.asarray(logits, "float64")
    return np.sum(np.log1p(np.exp(logits)) - y * logits)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("case, terms", [(segmentation, 16), (tagging, 6), (labels, 5), (steps, 12), (distribution, 1)])
def test_the_one_line_minimises_the_exact_negative_elbo(case, terms):
    """Keras's loss is −ELBO of an example over its labels; computed in NumPy."""
    model, x, y, loss, nll = case()
    model.compile(keras.optimizers.SGD(0.0), loss)
    history = model.fit(x, y, batch_size=4, validation_data=(x, y), callbacks=[kv.ELBO(num_examples=N)], verbose=0)
    kl = float(array(kv.kl_divergence(model)))
    exact = (nll(y, model.predict(x, verbose=0)) + kl) / N / terms
    np.testing.assert_allclose(history.history["val_loss"][0], exact, rtol=1e-3)
    # of the training loss the KL's part
    part = history.history["loss"][0] - history.history["nll"][0]
    np.testing.assert_allclose(part, kl / N / terms, rtol=1e-3)


@pytest.mark.slow
def test_several_outputs_minimise_it_too():
    inputs = keras.Input((6, 4))
    a, b = dense(3, name="a")(inputs), dense(1, name="b")(layers.Flatten()(inputs))
    model = keras.Model(inputs, {"a": a, "b": b})
    x = RNG.normal(size=(N, 6, 4))
    y = {"a": RNG.integers(0, 3, (N, 6)), "b": RNG.normal(size=(N, 1))}
    loss = {"a": losses.SparseCategoricalCrossentropy(from_logits=True), "b": "mse"}
    model.compile(keras.optimizers.SGD(0.0), loss)
    with pytest.raises(ValueError, match=r"'a': 6.0, 'b': 1.0"):
        model.fit(x, y, callbacks=[kv.ELBO(num_examples=N)], verbose=0)
    model.compile(keras.optimizers.SGD(0.0), loss, loss_weights={"a": 6.0, "b": 1.0})
    history = model.fit(x, y, validation_data=(x, y), callbacks=[kv.ELBO(num_examples=N)], verbose=0).history
    found = model.predict(x, verbose=0)
    nll = crossentropy(y["a"], found["a"]) + np.sum((y["b"] - found["b"]) ** 2)
    exact = (nll + float(array(kv.kl_divergence(model)))) / N
    np.testing.assert_allclose(history["val_loss"][0], exact, rtol=1e-3)


def test_the_user_overrules():
    """Masked outputs of 4 labels on average."""
    tokens = keras.Input((6,), dtype="int32")
    outputs = dense(3)(layers.Embedding(7, 3, mask_zero=True)(tokens))
    model = keras.Model(tokens, outputs)
    model.compile(keras.optimizers.SGD(0.0), losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.tile([1, 2, 3, 4, 0, 0], (N, 1))
    y = RNG.integers(0, 3, (N, 6))
    with pytest.raises(ValueError, match=r"labels_per_example.*masked|masked.*labels_per_example"):
        model.fit(x, y, callbacks=[kv.ELBO(num_examples=N)], verbose=0)
    model.fit(x, y, callbacks=[kv.ELBO(num_examples=N, labels_per_example=4)], verbose=0)
    np.testing.assert_allclose(array(model.layers[-1].kl_weight), 1 / N / 4, rtol=1e-6)
