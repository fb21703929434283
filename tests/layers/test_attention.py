"""Attention: Keras's layer where there is no noise, and with noise still attention."""

import inspect

import keras
import numpy as np
import pytest
from keras import layers

import keras_vdrop as kv
from keras_vdrop.functional import estimators
from tests.cases import array, randomize

ESTIMATORS = list(estimators.ESTIMATORS)
RNG = np.random.default_rng(0)
B, T, S, D = 2, 4, 5, 6
QUERY = RNG.normal(size=(B, T, D)).astype("float32")
VALUE = RNG.normal(size=(B, S, 3)).astype("float32")
KEY = RNG.normal(size=(B, S, 7)).astype("float32")
VIDEO = RNG.normal(size=(B, 2, 3, D)).astype("float32")
SIZES = {"num_heads": 2, "key_dim": 3}
PARTS = ["query", "key", "value", "output"]
HAS_GATE = "use_gate" in inspect.signature(layers.MultiHeadAttention).parameters
GATED = pytest.mark.skipif(not HAS_GATE, reason="this Keras has no gate")


def attention(**arguments):
    return kv.VariationalMultiHeadAttention(**{**SIZES, "kl_weight": 0.1, **arguments})


def projections(layer):
    """Those that the layer has: four, or five with a gate."""
    found = [getattr(layer, f"_{part}_dense", None) for part in (*PARTS, "gate")]
    return [projection for projection in found if projection is not None]


def pair(shapes, **arguments):
    """The variational layer without noise and Keras's own, built, with the same random weights."""
    layer = attention(initial_log_variance=-45.0, **arguments)
    twin = layers.MultiHeadAttention(**{**SIZES, **arguments})
    rng = np.random.default_rng(1)
    for each in (layer, twin):
        each.build(*shapes)
    for ours, theirs in zip(projections(layer), projections(twin), strict=True):
        for one, other in zip((ours.kernel.loc, ours.bias), (theirs.kernel, theirs.bias)):
            if one is not None:
                value = rng.normal(size=one.shape)
                one.assign(value)
                other.assign(value)
    return layer, twin


MASK = RNG.uniform(size=(B, T, S)) < 0.6
MASK[..., 0] = True
KERAS_CASES = {
    "self": ({}, [QUERY, QUERY], {}),
    "value": ({}, [QUERY, VALUE], {}),
    "value_and_key": ({}, [QUERY, VALUE, KEY], {}),
    "attention_mask": ({}, [QUERY, VALUE], {"attention_mask": MASK}),
    "causal": ({}, [QUERY, QUERY], {"use_causal_mask": True}),
    "causal_and_mask": ({}, [QUERY, VALUE, KEY], {"use_causal_mask": True, "attention_mask": MASK}),
    "scores": ({}, [QUERY, VALUE], {"return_attention_scores": True}),
    "causal_scores": ({}, [QUERY, QUERY], {"return_attention_scores": True, "use_causal_mask": True}),
    # With scores, since Keras's fused attention in JAX wants values of the size of the keys.
    "value_dim": ({"value_dim": 4}, [QUERY, VALUE, KEY], {"return_attention_scores": True}),
    "output_int": ({"output_shape": 5}, [QUERY, VALUE], {}),
    "output_tuple": ({"output_shape": (5, 2)}, [QUERY, VALUE], {}),
    "one_axis": ({"attention_axes": 2}, [VIDEO, VIDEO], {}),
    "two_axes": ({"attention_axes": (1, 2), "value_dim": 2, "output_shape": (3, 2)}, [VIDEO, VIDEO], {}),
    "negative_axis": ({"attention_axes": (-2,)}, [VIDEO, VIDEO], {"return_attention_scores": True}),
    "no_bias": ({"use_bias": False}, [QUERY, VALUE], {}),
}


def assert_equals_keras(layer, twin, inputs, call):
    expected = keras.tree.flatten(twin(*inputs, **call))
    for training in (False, True):
        outputs = keras.tree.flatten(layer(*inputs, training=training, **call))
        for output, value in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(array(output), array(value), rtol=1e-4, atol=1e-5)


@pytest.mark.slow(keep=6)
@pytest.mark.parametrize("case", KERAS_CASES)
def test_without_noise_it_is_keras(case):
    arguments, inputs, call = KERAS_CASES[case]
    assert_equals_keras(*pair([x.shape for x in inputs], **arguments), inputs, call)


@GATED
@pytest.mark.parametrize("use_bias", [True, False])
def test_without_noise_a_gate_is_that_of_keras(use_bias):
    pair_of_layers = pair([QUERY.shape, VALUE.shape], use_gate=True, use_bias=use_bias)
    assert_equals_keras(*pair_of_layers, [QUERY, VALUE], {})


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_without_noise_every_estimator_is_keras(estimator):
    layer, twin = pair([QUERY.shape, VALUE.shape])
    other = attention(initial_log_variance=-45.0, estimator=estimator)
    other.build(QUERY.shape, VALUE.shape)
    other.set_weights(layer.get_weights())
    assert_equals_keras(other, twin, [QUERY, VALUE], {})


@pytest.mark.parametrize("causal", [False, True])
def test_keras_masks_are_used_and_passed_on(causal):
    """Masks come from the query's and the value's embeddings; the query's goes on to what follows."""
    words, other_words = np.array([[1, 2, 3, 0], [4, 0, 1, 0]]), np.array([[1, 2, 0, 0, 4], [3, 3, 3, 3, 0]])
    embedding = layers.Embedding(5, D, mask_zero=True)
    query, value = layers.Input((T,)), layers.Input((S,))
    outputs = []
    for layer in pair([(None, T, D), (None, S, D)]):
        attended = layer(embedding(query), embedding(value), use_causal_mask=causal)
        outputs.append(layers.GlobalAveragePooling1D()(attended))
    model = keras.Model([query, value], outputs)
    for training in (False, True):
        ours, theirs = model([words, other_words], training=training)
        np.testing.assert_allclose(array(ours), array(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("call", [{"use_causal_mask": True}, {"attention_mask": np.tri(T, dtype=bool)[None]}], ids=list)
def test_a_token_of_the_future_does_not_reach_the_past(call, estimator):
    """Two layers of one seed draw the same noise; their inputs differ in the last token alone."""
    other = QUERY.copy()
    other[:, -1] += 1.0
    outputs = []
    for x in (QUERY, other):
        layer = attention(seed=3, estimator=estimator)
        layer.build(x.shape, x.shape)
        randomize(layer)
        outputs.append(array(layer(x, x, training=True, **call)))
    np.testing.assert_allclose(outputs[0][:, :-1], outputs[1][:, :-1], rtol=1e-5, atol=1e-5)
    assert (outputs[0][:, -1] != outputs[1][:, -1]).all()


def kind(make, *arguments, **keywords):
    """The type of the exception that a call raises."""
    with pytest.raises(Exception) as error:
        make(*arguments, **keywords)
    return error.type


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_heads": 0},
        {"num_heads": 2.0},
        {"key_dim": -1},
        {"key_dim": None},
        {"value_dim": 0},
        {"output_shape": 2.5},
        {"attention_axes": "time"},
        {"flash_attention": True, "dropout": 0.1},
        {"dropout": 2.0},
        {"heads": 3},
    ],
    ids=str,
)
def test_bad_arguments_raise_what_keras_raises(arguments):
    shapes = [QUERY.shape, VALUE.shape]
    expected = kind(lambda: layers.MultiHeadAttention(**{**SIZES, **arguments}).build(*shapes))
    assert kind(lambda: attention(**arguments).build(*shapes)) is expected


@pytest.mark.parametrize(
    "inputs", [[QUERY, VALUE, KEY[:, :-1]], [QUERY, VALUE[:, 0]], [QUERY]], ids=["length", "rank", "one"]
)
def test_bad_inputs_raise_what_keras_raises(inputs):
    expected = kind(layers.MultiHeadAttention(**SIZES), *inputs)
    assert kind(attention(), *inputs) is expected


def test_kl_weight_can_be_set_before_and_after_build():
    layer = attention(kl_weight=None)
    layer.kl_weight = 0.25
    assert layer.kl_weight == layer.get_config()["kl_weight"] == 0.25
    layer.build(QUERY.shape, VALUE.shape)
    for expected in (0.25, 0.5):
        layer.kl_weight = expected
        assert float(layer.kl_weight) == expected
        assert [float(projection.kl_weight) for projection in projections(layer)] == [expected] * 4
        kl = array(kv.kl_divergence(layer))
        np.testing.assert_allclose(array(sum(layer.losses)), expected * kl, rtol=1e-5)
    with pytest.raises(ValueError, match="kl_weight=-1"):
        layer.kl_weight = -1


@GATED
def test_kl_weight_reaches_the_gate():
    layer = attention(use_gate=True)
    layer.build(QUERY.shape, VALUE.shape)
    layer.kl_weight = 0.5
    assert [float(projection.kl_weight) for projection in projections(layer)] == [0.5] * 5


def test_kl_is_the_sum_over_the_projections():
    layer = attention(kernel_prior="normal", bias_prior="normal")
    layer(QUERY, VALUE, KEY)
    randomize(layer)
    parts = [array(kv.kl_divergence(projection)) for projection in projections(layer)]
    assert len(parts) == 4 and len(set(map(float, parts))) == 4
    np.testing.assert_allclose(array(kv.kl_divergence(layer)), sum(parts), rtol=1e-5)
    by_hand = [
        posterior.kl() for projection in projections(layer) for posterior in (projection.kernel, projection.bias)
    ]
    np.testing.assert_allclose(array(kv.kl_divergence(layer)), array(sum(by_hand)), rtol=1e-5)


@pytest.mark.parametrize("seed", [None, 3])
def test_projections_draw_noise_of_their_own(seed):
    """From inputs that pick out each weight: eight numbers in each of the kernels, standard normal."""
    layer = attention(
        num_heads=2,
        key_dim=2,
        kernel_initializer="zeros",
        initial_log_variance=0.0,
        seed=seed,
        estimator="reparameterization",
    )
    layer.build((1, 2, 2), (1, 2, 2))
    basis = [np.eye(2, dtype="float32")[None]] * 3 + [np.eye(4, dtype="float32").reshape(1, 4, 2, 2)]
    drawn = [np.ravel(array(part(x, training=True))) for part, x in zip(projections(layer), basis)]
    assert len(np.unique(drawn)) == 4 * 8


def test_equal_seeds_draw_equal_noise():
    outputs = []
    for seed in (3, 3, 4):
        layer = attention(seed=seed, kernel_initializer="ones", initial_log_variance=0.0)
        outputs.append(array(layer(QUERY, VALUE, training=True)))
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert (outputs[0] != outputs[2]).all()


@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", [True, False])
def test_fit_in_a_functional_model(jit_compile):
    words = layers.Input((T,), dtype="int32")
    x = layers.Embedding(5, D, mask_zero=True)(words)
    layer = attention(kl_weight=None, dropout=0.1)
    x = layer(x, x, use_causal_mask=True)
    model = keras.Model(words, layers.Dense(1)(layers.GlobalAveragePooling1D()(x)))
    model.compile("adam", "mse", jit_compile=jit_compile)
    before = [array(variable) for variable in layer.trainable_variables]
    rng = np.random.default_rng(0)
    data = rng.integers(1, 5, size=(8, T)), rng.normal(size=(8, 1))
    history = model.fit(*data, batch_size=4, epochs=2, callbacks=[kv.ELBO(8)], verbose=0).history
    assert np.isfinite(history["loss"]).all() and np.isfinite(history["kl"]).all()
    assert float(layer.kl_weight) == 1 / 8
    for old, new in zip(before, layer.trainable_variables):
        assert not np.array_equal(old, array(new)) or "key/bias" in new.path  # which no softmax notices


def test_free_bits_before_there_is_a_kl():
    with pytest.raises(ValueError, match="has not been built"):
        attention().free_bits = 0.1
