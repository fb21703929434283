"""`compact` returns a smaller model of Keras's own layers that predicts the same."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers, ops

import keras_vdrop as kv
from keras_vdrop.compaction.propagation import _kind
from keras_vdrop.compaction.rules import Rule
from tests.cases import array, posteriors, stock

pytestmark = pytest.mark.any_backend


def sparse(model, share=0.3, whole=0.5, seed=0):
    """Give a model of Keras layers random weights, most of them 0: single weights and whole inputs and outputs."""
    rng = np.random.default_rng(seed)

    def thin(variable):
        value = rng.normal(size=variable.shape)
        if "variance" in variable.name:
            return np.abs(value) + 0.5
        if "kernel" in variable.name or variable.name == "embeddings":
            value *= rng.random(value.shape) < share
            value *= rng.random(value.shape[-1]) < whole
            value *= rng.random((*value.shape[:-1], 1)) < whole if len(value.shape) > 1 else 1
        elif "bias" in variable.name or "beta" in variable.name:
            value *= rng.random(value.shape) < 0.5
        return value

    for variable in model.weights:
        variable.assign(thin(variable))
    return model


def data(model, seed=0, examples=6):
    """Return random inputs: numbers for float inputs, else integers (nonzero mostly, so that masks are mostly True)."""
    rng = np.random.default_rng(seed)

    def random(x):
        shape = [examples, *(7 if size is None else size for size in x.shape[1:])]
        return rng.normal(size=shape).astype("float32") if "float" in x.dtype else rng.integers(0, 9, shape)

    inputs = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    return keras.tree.map_structure(random, inputs)


def compacted(model):
    """Compact a model and assert that the result predicts the same on inputs that `compact` has not seen."""
    small = kv.compact(model)
    x = data(model)
    for expected, found in zip(keras.tree.flatten(model(x)), keras.tree.flatten(small(x))):
        scale = max(np.abs(array(expected)).max(), 1e-3)
        np.testing.assert_allclose(array(found), array(expected), atol=1e-5 * scale)
    assert stock(small)
    assert small.count_params() <= model.count_params()
    return small


def test_units_that_nothing_reads_and_units_that_read_nothing():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(2)])
    first = np.ones((3, 4), "float32")
    first[:, 1] = 0  # a constant unit: tanh(0.5)
    second = np.ones((4, 2), "float32")
    second[2] = 0  # a unit that nothing reads
    model.layers[0].set_weights([first, np.full(4, 0.5)])
    model.layers[1].set_weights([second, np.zeros(2)])
    small = compacted(model)
    assert small.layers[0].units == 2
    np.testing.assert_allclose(array(small.layers[1].bias), np.tanh([0.5, 0.5]), rtol=1e-6)


def test_a_bias_is_made_where_a_constant_goes():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4), layers.Dense(2, use_bias=False)])
    kernel = np.ones((3, 4), "float32")
    kernel[:, 0] = 0
    model.layers[0].set_weights([kernel, np.ones(4)])
    assert compacted(model).layers[1].use_bias


def test_a_constant_stays_where_the_border_shows():
    def model(padding, bias):
        model = keras.Sequential([keras.Input((5, 5, 1)), layers.Conv2D(3, 1), layers.Conv2D(2, 3, padding=padding)])
        kernel = np.ones((1, 1, 1, 3), "float32")
        kernel[..., 0] = 0
        model.layers[0].set_weights([kernel, np.full(3, bias)])
        return model

    assert compacted(model("same", 0.7)).layers[0].filters == 3
    assert compacted(model("valid", 0.7)).layers[0].filters == 2
    assert compacted(model("same", 0.0)).layers[0].filters == 2


def test_convolutional_network_with_branches():
    x = keras.Input((8, 8, 2))
    h = layers.BatchNormalization()(layers.Conv2D(12, 3, padding="same", activation="relu")(x))
    a = layers.Conv2D(6, 3, padding="same")(h)
    b = layers.ReLU()(layers.Conv2D(6, 1)(h))
    h = layers.Concatenate()([layers.Add()([a, b]), layers.Multiply()([a, b]), layers.Maximum()([a, b])])
    h = layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same")(layers.ZeroPadding2D()(h))
    h = layers.Conv2DTranspose(5, 2, strides=2)(layers.MaxPooling2D()(layers.SpatialDropout2D(0.5)(h)))
    h = layers.Dense(7, "gelu")(layers.Flatten()(layers.AveragePooling2D(2, padding="same")(h)))
    model = keras.Model(x, [layers.Dense(3, "softmax")(h), layers.Dense(2)(layers.GlobalMaxPooling2D()(a))])
    for seed in range(4):
        small = compacted(sparse(model, share=0.05, seed=seed))
        assert small.count_params() < model.count_params() / 2


def residual_network():
    """Return a ResNet of two stages with BatchNormalization, and a projection where the shape changes."""

    def normalized(h, filters, size, strides=1):
        h = layers.Conv2D(filters, size, strides=strides, padding="same", use_bias=False)(h)
        return layers.BatchNormalization()(h)

    x = keras.Input((8, 8, 1))
    h = layers.ReLU()(normalized(x, 6, 3))
    for filters, strides in ((6, 1), (10, 2), (10, 1)):
        inner = normalized(layers.ReLU()(normalized(h, filters, 3, strides)), filters, 3)
        h = layers.ReLU()(layers.Add()([h if strides == 1 else normalized(h, filters, 1, strides), inner]))
    return keras.Model(x, layers.Dense(4)(layers.GlobalAveragePooling2D()(h)))


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("group_axis", [None, -1, -2])
def test_a_trained_resnet_stays_the_same_from_conversion_to_compaction(group_axis):
    rng = np.random.default_rng(0)
    trained = residual_network()
    for variable in trained.weights:
        spread = rng.normal(size=variable.shape) * (0.3 if "kernel" in variable.name else 1.0)
        variable.assign(np.abs(spread) + 0.5 if "variance" in variable.name else spread)
    x = rng.normal(size=(16, 8, 8, 1)).astype("float32")
    before = array(trained(x))
    model = kv.to_variational(trained, prior=kv.priors.ARD(group_axis=group_axis), print_fn=lambda line: None)
    np.testing.assert_allclose(array(model(x)), before, rtol=1e-6, atol=1e-6 * np.abs(before).max())

    for weight in posteriors(model):
        shape = [1] * len(weight.shape)
        shape[group_axis or 0] = weight.shape[group_axis or 0]
        noisy = rng.random(weight.shape if group_axis is None else shape) < (0.4 if weight.shape[-2] > 1 else 0.0)
        weight.log_variance.assign(np.where(noisy, 9.0, -9.0) * np.ones(weight.shape))
    report = kv.prune(model, 5.0)
    assert report.left < report.weights
    pruned = array(model(x))
    small = kv.compact(model, 5.0, x=x)
    np.testing.assert_allclose(array(small(x)), pruned, rtol=1e-5, atol=1e-5 * np.abs(pruned).max())
    assert stock(small)
    firsts = [layer.filters for layer in small.layers if isinstance(layer, layers.Conv2D)]
    if group_axis == -2:  # filters that the next layer does not read go, even before a normalization
        assert small.count_params() < 0.6 * trained.count_params() and firsts[1] < 6


def test_operations_are_as_good_as_layers():
    def network(add, concatenate, relu):
        x = keras.Input((6,))
        a, b = layers.Dense(16)(x), layers.Dense(16)(x)
        h = concatenate([relu(add(a, b)), a * b, ops.tanh(a)])
        return keras.Model(x, layers.Dense(2)(h))

    operations = network(lambda a, b: a + b, lambda tensors: ops.concatenate(tensors, axis=-1), ops.relu)
    as_layers = network(lambda a, b: layers.Add()([a, b]), layers.Concatenate(), layers.ReLU())
    sizes = [compacted(sparse(model, share=0.1)).count_params() for model in (operations, as_layers)]
    assert sizes[0] == sizes[1] < as_layers.count_params() / 2


def test_operations_of_the_users_own_are_not_known_by_their_name():
    class Relu(keras.Operation):
        def call(self, x):
            return ops.cumsum(x, axis=-1)

        def compute_output_spec(self, x):
            return keras.KerasTensor(x.shape, x.dtype)

    assert _kind(Relu()) is Rule


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("cls", [layers.LSTM, layers.GRU, layers.SimpleRNN])
@pytest.mark.parametrize("use_bias", [False, True])
def test_recurrent_network(cls, use_bias):
    x = keras.Input((7,), dtype="int32")
    h = layers.Embedding(9, 8, mask_zero=True)(x)
    h = cls(10, return_sequences=True, use_bias=use_bias)(h)
    h, *states = cls(9, return_state=True, use_bias=use_bias)(h)
    model = keras.Model(x, [layers.Dense(2)(h), layers.Dense(1)(states[0])])
    for seed in range(2):
        sparse(model, share=0.2, seed=seed)
        small = compacted(model)
        assert small.count_params() < model.count_params() / 2


def test_a_dead_recurrent_unit_is_one_without_a_candidate():
    model = keras.Sequential([keras.Input((4, 3)), layers.LSTM(2), layers.Dense(1)])
    kernel, recurrent, bias = model.layers[0].get_weights()
    for weights in (kernel, recurrent, bias):
        weights.reshape(-1, 4, 2)[:, 2, 0] = 0
    model.layers[0].set_weights([kernel, recurrent, bias])
    assert compacted(model).layers[0].units == 1


def test_shared_layers_and_models_within_models():
    shared = layers.Dense(6, "relu", name="shared")
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(20, "relu"), layers.Dense(6)], name="inner")
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    h = layers.Subtract()([inner(shared(a)), shared(inner(b))])
    model = sparse(keras.Model({"a": a, "b": b}, layers.Dense(2)(shared(h))))
    small = compacted(model)
    assert small.get_layer("inner").layers[0].units < 20


def test_shared_on_inputs_of_other_lengths_and_for_other_outputs():
    table, lstm = layers.Embedding(9, 8), layers.LSTM(7, return_state=True)
    a, b = keras.Input((5,), dtype="int32"), keras.Input((3,), dtype="int32")
    joined = layers.Concatenate()([a, b])  # the axis holds indices, not channels
    h, *_ = lstm(table(a))
    _, *states = lstm(table(joined))
    model = keras.Model([a, b], [layers.Dense(2)(h), layers.Dense(1)(states[1])])
    for seed in range(3):
        small = compacted(sparse(model, share=0.2, seed=seed))
        assert small.count_params() < model.count_params() / 2


def test_layers_of_which_nothing_is_known_keep_their_shape():
    x = keras.Input((5, 6))
    h = layers.LayerNormalization()(layers.Dense(6)(x))
    h = layers.Permute((2, 1))(layers.GroupNormalization(2)(h))
    h = layers.Reshape((6, 5))(layers.Reshape((10, 3))(h))
    h = keras.ops.concatenate([h * 2.0, layers.Dense(4, "softmax")(h)], axis=-1)
    model = sparse(keras.Model(x, layers.Dense(2)(layers.RNN(layers.GRUCell(3))(h))))
    assert compacted(model).layers[1].units == 6


def attention(*arguments, x=(5, 6), call=None, **keywords):
    """Return a model of self-attention and a dense layer."""
    x = keras.Input(x)
    h = layers.MultiHeadAttention(*arguments, name="attention", **keywords)(x, x, **(call or {}))
    return keras.Model(x, layers.Dense(2)(h[0] if isinstance(h, tuple) else h))


def change(layer, weight, index, value):
    """Set the elements at `index` of one of the layer's weights to `value`."""
    weights = layer.get_weights()
    weights[weight][index] = value
    layer.set_weights(weights)


QUERY, QUERY_BIAS, KEY, KEY_BIAS, VALUE, VALUE_BIAS, OUTPUT, OUTPUT_BIAS = range(8)


def dense_weights(model):
    return sparse(model, share=1.0, whole=1.0)


def test_heads_and_their_sizes():
    model = dense_weights(attention(3, 4))
    layer = model.get_layer("attention")
    change(layer, OUTPUT, np.s_[0], 0)  # a head that nothing reads
    change(layer, VALUE, np.s_[:, :, :2], 0)  # constant values
    change(layer, VALUE_BIAS, np.s_[:], 0.7)
    change(layer, KEY, np.s_[:, :, 3], 0)  # equal for all keys, so the softmax ignores it
    change(layer, KEY_BIAS, np.s_[:], 0.5)
    change(layer, QUERY, np.s_[:, :, :2], 0)  # equal for all queries, so both can merge into one number per head
    change(layer, QUERY_BIAS, np.s_[:], 0.3)
    small = compacted(model).get_layer("attention")
    assert (small.num_heads, small.key_dim, small.value_dim) == (2, 2, 2)
    change(layer, QUERY_BIAS, np.s_[:, :2], 0)
    change(layer, VALUE, np.s_[1, :, 1], 0)
    change(layer, VALUE, np.s_[:, :, 2], 0)
    small = compacted(model).get_layer("attention")
    assert (small.num_heads, small.key_dim, small.value_dim) == (2, 1, 1)


def test_inputs_and_outputs_of_attention():
    x = keras.Input((5, 3))
    h = layers.Dense(8, name="narrow")(x)
    h = layers.MultiHeadAttention(2, 3, name="attention", use_bias=False)(h, value=h, key=h)
    model = dense_weights(keras.Model(x, layers.Dense(2)(h)))
    layer = model.get_layer("attention")
    for kernel in (QUERY, 1, 2):
        change(layer, kernel, np.s_[4:], 0)
    change(model.layers[-1], 0, np.s_[:5], 0)
    change(model.get_layer("narrow"), 0, np.s_[:, 0], 0)  # a constant unit, which must become a bias
    change(model.get_layer("narrow"), 1, np.s_[0], 1.0)
    small = compacted(model)
    assert small.get_layer("narrow").units == 3
    assert small.get_layer("attention").get_config()["output_shape"] == (3,)
    assert small.get_layer("attention").use_bias


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention_with_masks(dropout):
    x, words = keras.Input((5, 6)), keras.Input((4,), dtype="int32")
    allowed = keras.Input((5, 5), dtype="bool")
    table = layers.Embedding(9, 7, mask_zero=True)(words)
    h = layers.MultiHeadAttention(4, 4, dropout=dropout)(x, x, attention_mask=allowed)
    h = layers.MultiHeadAttention(3, 4, dropout=dropout, output_shape=9)(h, key=h, value=h, use_causal_mask=True)
    h = layers.MultiHeadAttention(3, 4, dropout=dropout, use_bias=False)(h, table)
    h = layers.Add()([h, layers.MultiHeadAttention(2, 4, dropout=dropout)(h, h)])
    model = keras.Model([x, allowed, words], layers.Dense(2)(h))
    sparse(model, share=0.6, whole=0.8)
    assert compacted(model).count_params() < model.count_params()


def test_constant_values_stay_where_weights_may_be_0():
    def value_dim(**how):
        x, allowed = keras.Input((5, 6)), keras.Input((5, 5), dtype="bool")
        masks = {"attention_mask": allowed} if how.pop("masked", False) else {}
        layer = layers.MultiHeadAttention(2, 3, name="attention", value_dim=3, **how)
        model = dense_weights(keras.Model([x, allowed], layers.Dense(2)(layer(x, x, **masks))))
        change(layer, VALUE, np.s_[:, :, 0], 0)
        change(layer, KEY, np.s_[:, :, 0], 0)
        change(layer, VALUE_BIAS, np.s_[:], 0.7)
        return compacted(model).get_layer("attention").value_dim

    assert value_dim(masked=True, dropout=0.1) == 3
    assert value_dim(masked=True) == 2
    assert value_dim(dropout=0.1) == 2


@pytest.mark.slow
def test_attention_of_which_more_is_read_than_its_output():
    gone = {"call": {"return_attention_scores": True}}
    models = [attention(2, 3, **gone), attention(2, 3, use_gate=True), attention(2, 3, output_shape=6)]
    for model in models:
        change(dense_weights(model).get_layer("attention"), OUTPUT, np.s_[0], 0)
    assert [compacted(model).get_layer("attention").num_heads for model in models] == [2, 2, 1]


def test_attention_that_jax_can_compute():
    """JAX's attention requires keys and values of one size, so `key_dim` stays at `value_dim`."""
    model = dense_weights(attention(2, 4))
    change(model.get_layer("attention"), KEY, np.s_[:, :, 1:], 0)
    small = compacted(model).get_layer("attention")
    assert small.key_dim == small.value_dim == 4


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize(
    "cls, mode",
    [
        (layers.LSTM, "concat"),
        (layers.LSTM, None),
        (layers.GRU, "sum"),
        (layers.SimpleRNN, "mul"),
        (layers.SimpleRNN, "ave"),
    ],
)
def test_both_ways(cls, mode):
    x = keras.Input((4, 5))
    h = layers.Bidirectional(layers.SimpleRNN(8, return_sequences=True))(layers.Dense(6)(x))
    both = layers.Bidirectional(cls(7, return_state=True), merge_mode=mode)(h)
    model = sparse(keras.Model(x, [layers.Dense(2)(both[0]), layers.Dense(2)(both[-1])]), share=0.2, seed=1)
    small = compacted(model)
    ways = small.layers[3].forward_layer, small.layers[3].backward_layer
    assert ways[0].units == ways[1].units < 7
    assert small.layers[2].forward_layer.units == small.layers[2].backward_layer.units < 8


def test_both_ways_keep_what_one_needs():
    x = keras.Input((4, 5))
    model = dense_weights(keras.Model(x, layers.Dense(2)(layers.Bidirectional(layers.SimpleRNN(3))(x))))
    for name in ("forward_layer", "backward_layer"):
        change(getattr(model.layers[1], name), 1, np.s_[:], 0)  # no unit reads another
    change(model.layers[2], 0, np.s_[:2], 0)  # reads one forward unit and, with the next line, two backward units
    change(model.layers[2], 0, np.s_[3], 0)
    small = compacted(model)
    assert small.layers[1].forward_layer.units == small.layers[1].backward_layer.units == 2


def test_separable_convolutions():
    def model(padding, bias):
        x = keras.Input((6, 6, 3))
        h = layers.SeparableConv2D(4, 3, depth_multiplier=3, padding=padding, use_bias=False)(layers.Conv2D(5, 1)(x))
        model = dense_weights(keras.Model(x, layers.Dense(2)(layers.GlobalAveragePooling2D()(h))))
        change(model.layers[1], 0, np.s_[..., 0], 0)
        change(model.layers[1], 1, np.s_[0], bias)
        change(model.layers[2], 0, np.s_[..., 1], 0)
        change(model.layers[-1], 0, np.s_[0], 0)
        return model

    sizes = [("valid", 0.7, 4, True), ("same", 0.7, 5, False), ("same", 0.0, 4, False)]
    for padding, bias, channels, use_bias in sizes:
        first, second = compacted(model(padding, bias)).layers[1:3]
        assert (first.filters, second.filters, second.depth_multiplier) == (channels, 3, 2)
        assert second.use_bias == use_bias
    x = keras.Input((6, 5))
    h = layers.SeparableConv1D(7, 3, depth_multiplier=2, activation="relu")(x)
    for seed in range(2):
        small = compacted(sparse(keras.Model(x, layers.Conv1D(2, 3)(h)), seed=seed))
        assert small.layers[1].filters < 7


def test_places_that_move():
    x = keras.Input((4, 3))
    h = layers.Permute((2, 1, 3))(layers.Reshape((2, 2, 8))(layers.Dense(8)(x)))
    h = layers.Reshape((-1, 16))(h)
    h = layers.Dense(12, name="narrow")(layers.Reshape((32,))(h))
    h = layers.TimeDistributed(layers.Conv1D(5, 2, activation="relu"))(layers.Reshape((2, 2, 3))(h))
    h = layers.TimeDistributed(keras.Sequential([keras.Input((1, 5)), layers.Dense(20), layers.Dense(4)]))(h)
    h = layers.TimeDistributed(layers.Flatten())(layers.TimeDistributed(layers.BatchNormalization())(h))
    model = keras.Model(x, layers.Dense(2)(layers.Flatten()(h)))
    for seed in range(2):
        small = compacted(sparse(model, share=0.5, whole=0.7, seed=seed))
        assert small.layers[1].units < 8 and small.get_layer("narrow").units in (
            4,
            8,
            12,
        )  # up to 3 channels, at 4 positions each
        assert small.count_params() < model.count_params() / 2


def test_a_reshape_that_is_called_on_channels_of_other_sizes():
    a, b = keras.Input((4, 6)), keras.Input((2, 3))
    reshape = layers.Reshape((-1, 3))
    h = [layers.Dense(2)(reshape(layers.Dense(6)(a))), layers.Dense(2)(reshape(layers.Dense(3)(b)))]
    assert compacted(sparse(keras.Model([a, b], h))).get_layer(reshape.name).target_shape == (-1, 3)


def words(model, alive=0.1):
    """Set the embeddings of all but a random share `alive` of the words to 0, and randomise the other weights."""
    rng = np.random.default_rng(0)
    sparse(model, share=1.0, whole=1.0)
    for layer in model.layers:
        if isinstance(layer, layers.Embedding):
            layer.set_weights([rng.normal(size=layer.embeddings.shape) * (rng.random((layer.input_dim, 1)) < alive)])
    return model


def after_words(model):
    """Predict for sequences of 60 words with padding, one of which is only padding."""
    x = np.random.default_rng(0).integers(0, 60, (8, 7))
    x[:, 4:] = 0
    x[0] = 0
    return array(model(x.astype("int32")))


def models_of_words():
    def attend(h):
        h = layers.MultiHeadAttention(2, 4)(h, h)
        return layers.Dense(2)(keras.ops.max(h, axis=1))

    def functional(*after, shape=(7,), mask_zero=True):
        x = h = keras.Input(shape, dtype="int32")
        h = layers.Embedding(60, 8, mask_zero=mask_zero)(h)
        for layer in after:
            h = layer(h)
        return keras.Model(x, h)

    def sequential(*after):
        first = [keras.Input((None,), dtype="int32"), layers.Embedding(60, 8, mask_zero=True, name="words")]
        return keras.Sequential([*first, *after])

    return {
        "functional": functional(layers.LSTM(3)),
        "attention": functional(attend),
        "unmasked": functional(layers.GRU(3), shape=(None,), mask_zero=False),
        "sequential": sequential(layers.Dropout(0.5), layers.LSTM(3)),
    }


@pytest.mark.parametrize("name", ["functional", "attention", "unmasked", "sequential"])
def test_words_of_which_nothing_is_left(name):
    model = words(models_of_words()[name])
    small = compacted(model)
    assert small.count_params() < model.count_params() - 60 * 8 / 2
    np.testing.assert_allclose(after_words(small), after_words(model), atol=1e-6)
    remap, _, table = next(layer for layer in small.layers if isinstance(layer, keras.Sequential)).layers
    assert not remap.trainable and table.trainable
    if table.mask_zero:
        np.testing.assert_array_equal(array(remap.embeddings)[:, 0] == 0, np.arange(60) == 0)
    assert compacted(small).count_params() == small.count_params()


@pytest.mark.slow
def test_words_are_loaded_without_this_package(tmp_path):
    model = words(models_of_words()["sequential"])
    kv.compact(model).save(tmp_path / "small.keras")
    x = np.random.default_rng(0).integers(0, 60, (8, 7))
    x[:, 4:] = 0
    np.save(tmp_path / "x.npy", x.astype("int32"))
    code = "import sys, keras, numpy as np; model = keras.saving.load_model('small.keras'); "
    code += "np.save('y.npy', model.predict(np.load('x.npy'), verbose=0)); assert 'keras_vdrop' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), array(model(x.astype("int32"))), atol=1e-6)


def test_words_stay_where_that_is_no_smaller_or_not_the_same():
    def model(dtype, **arguments):
        first = [keras.Input((7,), dtype=dtype), layers.Embedding(60, **arguments)]
        return words(keras.Sequential([*first, layers.LSTM(3)]))

    one_number = model("int32", output_dim=1)
    numbers = model("float32", output_dim=8, mask_zero=True)  # 0.5 is cast to word 0, but is not masked
    two = words(keras.Sequential([keras.Input((None, None)), layers.Embedding(60, 8), layers.Dense(2)]))
    for each in (one_number, numbers, two):
        assert isinstance(compacted(each).layers[0], layers.Embedding)
    assert isinstance(compacted(model("float32", output_dim=8)).layers[0], keras.Sequential)


def test_words_of_a_shared_table_and_in_mixed_precision():
    a, b = keras.Input((5,), dtype="int32"), keras.Input((3,), dtype="int32")
    table = layers.Embedding(5000, 4, mask_zero=True, dtype="mixed_float16")
    h = [layers.LSTM(3)(table(a)), layers.LSTM(3)(table(b))]
    model = words(keras.Model([a, b], h), alive=0.5)
    small = compacted(model)
    assert small.count_params() < model.count_params() - 2000
    x = [np.arange(4990, 4995)[None], np.arange(3001, 3004)[None]]
    for expected, found in zip(model(x), small(x)):
        np.testing.assert_allclose(array(found), array(expected), atol=1e-6)


def test_ours_becomes_small_and_stays_as_it_is():
    model = keras.Sequential([keras.Input((8,)), kv.VariationalDense(16, activation="relu"), kv.VariationalDense(3)])
    log_variance = np.full((8, 16), -40.0)
    log_variance[:, 5:] = 10.0
    model.layers[0].kernel.log_variance.assign(log_variance)
    small = kv.compact(model)
    assert small.layers[0].units == 5
    assert kv.sparsity(model).left == 8 * 5 + 16 * 3
    assert array(model.layers[0].kernel.mask).all()
    kv.prune(model)
    x = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")
    np.testing.assert_allclose(array(small(x)), array(model(x)), atol=1e-5)
    with pytest.warns(UserWarning, match="No weights are kept"):
        assert kv.compact(model, threshold=-30.0).count_params() < 20


def test_units_that_gaussian_dropout_has_pruned():
    model = keras.Sequential(
        [
            keras.Input((5, 4)),
            layers.Conv1D(6, 3),
            kv.VariationalGaussianDropout(0.5),
            layers.Conv1D(3, 3, padding="same"),
        ]
    )
    model.layers[1].scale.log_variance.assign([-5.0, 9.0, -5.0, 9.0, 9.0, -5.0])
    small = kv.compact(model)
    assert small.layers[0].filters == 3
    kv.prune(model)
    x = data(model)
    np.testing.assert_allclose(array(small(x)), array(model(x)), atol=1e-5)


@pytest.mark.slow
def test_a_layer_of_which_nothing_is_left():
    model = keras.Sequential([keras.Input((8,)), kv.VariationalDense(16, name="gone"), kv.VariationalDense(3)])
    model.layers[0].kernel.log_variance.assign(np.full((8, 16), 10.0))
    with pytest.warns(UserWarning, match="No weights are kept in gone"):
        small = kv.compact(model)
    assert small.layers[0].units == 1
    with pytest.warns(UserWarning, match="No weights are kept in gone"):
        kv.prune(model)


def test_saved_and_loaded(tmp_path):
    model = sparse(keras.Sequential([keras.Input((8, 8, 1)), layers.Conv2D(9, 3), layers.Flatten(), layers.Dense(3)]))
    small = compacted(model)
    small.save(tmp_path / "small.keras")
    x = data(model)
    loaded = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_array_equal(array(loaded(x)), array(small(x)))


def test_a_fault_is_no_model(monkeypatch):
    model = sparse(keras.Sequential([keras.Input((8,)), layers.Dense(9), layers.Dense(3)]), share=1.0, whole=1.0)
    from keras_vdrop.compaction import rules

    monkeypatch.setattr(rules.Affine, "need", lambda *_: None)
    with pytest.raises(RuntimeError, match="does not predict the same as"):
        kv.compact(model)


STEPS = {
    "dense": lambda h: layers.Dense(5, "relu")(h),
    "elu": lambda h: layers.Activation("elu")(h),
    "convolution": lambda h: layers.Conv1D(4, 3, padding="same", activation="tanh")(h),
    "valid": lambda h: layers.Conv1D(6, 1)(h),
    "normalization": lambda h: layers.BatchNormalization()(h),
    "depthwise": lambda h: layers.DepthwiseConv1D(3, padding="same")(h),
    "pooling": lambda h: layers.AveragePooling1D(2, strides=1, padding="same")(h),
    "recurrent": lambda h: layers.GRU(4, return_sequences=True)(h),
    "opaque": lambda h: layers.LayerNormalization()(h),
    "softmax": lambda h: layers.Dense(4, "softmax")(h),
    "attention": lambda h: layers.MultiHeadAttention(2, 3)(h, h, use_causal_mask=True),
    "attention_to_all": lambda h: layers.MultiHeadAttention(2, 3, value_dim=2, dropout=0.1)(h, h),
    "both_ways": lambda h: layers.Bidirectional(layers.SimpleRNN(3, return_sequences=True))(h),
    "separable": lambda h: layers.SeparableConv1D(5, 3, depth_multiplier=2, padding="same")(h),
    "places": lambda h: layers.Reshape((6, -1))(layers.Reshape((3, 2, h.shape[-1]))(h)),
    "distributed": lambda h: layers.TimeDistributed(layers.Dense(4, "relu"))(h),
    "branches": lambda h: layers.Add()([layers.Dense(5, "relu")(h), layers.Conv1D(5, 3, padding="same")(h)]),
    "joined": lambda h: layers.Concatenate()([h, layers.Dense(3, "sigmoid")(h)]),
    "residual": lambda h: layers.Add()([h, layers.Dense(h.shape[-1], "tanh")(h)]),
}


@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    steps=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6),
    share=st.sampled_from([0.1, 0.4, 1.0]),
    whole=st.sampled_from([0.3, 0.8]),
    seed=st.integers(0, 1000),
)
def test_random_networks(steps, share, whole, seed):
    keras.backend.clear_session()
    x = h = keras.Input((6, 3))
    for step in steps:
        h = STEPS[step](h)
    compacted(sparse(keras.Model(x, layers.Dense(2)(layers.Flatten()(h))), share, whole, seed))


def test_shared_layers_that_are_called_in_several_ways():
    a, b = keras.Input((4,)), keras.Input((4,))
    dense, noise = layers.Dense(6, "relu"), kv.VariationalGaussianDropout(0.5)
    by_keyword = keras.Model([a, b], [layers.Dense(2)(dense(a)), layers.Dense(2)(dense(inputs=b))])
    compacted(sparse(by_keyword))
    model = keras.Model([a, b], [layers.Dense(2)(noise(a)), layers.Dense(2)(noise(b))])
    noise.scale.log_variance.assign([9.0, -5.0, -5.0, -5.0])
    kernel = np.ones((4, 2), "float32")
    kernel[1] = 0
    model.layers[-1].set_weights([kernel, np.zeros(2)])
    kv.prune(model)
    small, x = kv.compact(model), data(model)
    for expected, found in zip(model(x), small(x)):
        np.testing.assert_allclose(array(found), array(expected), atol=1e-5)


def test_the_comparison_is_with_the_model_itself():
    normalization = layers.Normalization()
    normalization.adapt(np.random.default_rng(0).normal(3.0, 2.0, size=(100, 3)))
    compacted(keras.Sequential([keras.Input((3,)), normalization, layers.Dense(4), layers.Dense(2)]))


def test_on_real_inputs_where_made_up_ones_will_not_do():
    x = keras.Input((None, 3))
    model = sparse(keras.Model(x, layers.Conv1D(4, 100)(layers.Conv1D(5, 3)(x))))
    with pytest.raises(ValueError, match="Pass real inputs as `x`"):
        kv.compact(model)
    real = np.random.default_rng(0).normal(size=(300, 120, 3)).astype("float32")
    np.testing.assert_allclose(array(kv.compact(model, x=real)(real)), array(model(real)), atol=1e-4)


def test_nan_where_the_model_has_nan():
    x = keras.Input((5,))
    model = sparse(keras.Model(x, layers.Dense(2)(layers.Dense(6)(keras.ops.log(x)))))
    assert kv.compact(model).layers[-1].units == 2


def test_mixed_precision_and_outputs_that_are_no_floats():
    x = keras.Input((16,))
    h = layers.Dense(32, "tanh", dtype="mixed_float16")(x)
    y = layers.Dense(3, dtype="float32")(layers.Dense(32, "tanh", dtype="mixed_float16")(h))
    small = kv.compact(sparse(keras.Model(x, [y, y > 0]), share=1.0))
    assert small.layers[1].units < 32


def test_memory_of_a_stateful_layer_is_as_it_was():
    model = keras.Sequential([keras.Input(batch_shape=(2, 3, 4)), layers.LSTM(5, stateful=True), layers.Dense(1)])
    sparse(model, share=1.0, whole=1.0)
    model(data(model, examples=2))
    before = [array(state) for state in model.layers[0].states]
    small = kv.compact(model)
    for old, now in zip(before, model.layers[0].states):
        np.testing.assert_array_equal(array(now), old)
    assert all(not array(state).any() for state in small.layers[0].states)


def test_functions_that_mix_units():
    x = keras.Input((4, 3))
    h = layers.LSTM(6, recurrent_activation="softmax", return_sequences=True)(x)
    model = sparse(keras.Model(x, layers.Dense(2)(layers.SimpleRNN(5, activation="softmax")(h))))
    compacted(model)


def test_last_layer_with_several_outputs():
    compacted(sparse(keras.Sequential([keras.Input((4, 3)), layers.Dense(6), layers.LSTM(5, return_state=True)])))


class Subclassed(keras.Model):
    def call(self, x):
        return x


class Mine(layers.Layer):
    def call(self, x):
        return x * 2.0


def my_loss(y, p):
    return (y - p) ** 2


def test_what_is_the_users_own():
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(6), Mine(), layers.Dense(5), Subclassed(), layers.Dense(1)]
    )
    model.compile("sgd", my_loss)
    small = kv.compact(sparse(model))
    assert small.layers[0].units == 6 and model.compiled and not small.compiled


def test_bad_input():
    with pytest.raises(ValueError, match="Functional or Sequential"):
        kv.compact(Subclassed())
