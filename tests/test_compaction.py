"""The smaller model of Keras's own layers, which predicts the same."""

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers

import keras_vdrop as kv
from tests.cases import array, stock


def sparse(model, share=0.3, whole=0.5, seed=0):
    """Give a model of Keras's layers random weights, most of them 0: single ones, and whole inputs and outputs."""
    rng = np.random.default_rng(seed)

    def thin(variable):
        value = rng.normal(size=variable.shape)
        if "variance" in variable.name:
            return np.abs(value) + 0.5
        if variable.name in ("kernel", "recurrent_kernel", "embeddings", "depthwise_kernel"):
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
    """Random inputs: numbers, or indices."""
    rng = np.random.default_rng(seed)
    return keras.tree.map_structure(
        lambda x: (
            rng.integers(0, 9, (examples, *x.shape[1:]))
            if "int" in x.dtype
            else rng.normal(size=(examples, *x.shape[1:])).astype("float32")
        ),
        model.inputs[0] if isinstance(model, keras.Sequential) else model.input,
    )


def compacted(model):
    """The smaller model, seen to predict the same on other inputs than `compact` looks at."""
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
    first[:, 1] = 0  # constant: tanh(0.5)
    second = np.ones((4, 2), "float32")
    second[2] = 0  # read by nobody
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
    joined = layers.Concatenate()([a, b])  # of indices, which are no channels
    h, *_ = lstm(table(a))
    _, *states = lstm(table(joined))
    model = keras.Model([a, b], [layers.Dense(2)(h), layers.Dense(1)(states[1])])
    for seed in range(3):
        small = compacted(sparse(model, share=0.2, seed=seed))
        assert small.count_params() < model.count_params() / 2


def test_layers_of_which_nothing_is_known_keep_their_shape():
    x = keras.Input((5, 6))
    h = layers.LayerNormalization()(layers.Dense(6)(x))
    h = layers.MultiHeadAttention(2, 3)(h, h)
    h = keras.ops.concatenate([h * 2.0, layers.Dense(4, "softmax")(h)], axis=-1)
    model = sparse(keras.Model(x, layers.Dense(2)(layers.Bidirectional(layers.GRU(3))(h))))
    assert compacted(model).layers[1].units == 6


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
    with pytest.warns(UserWarning, match="Nothing is left"):
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


def test_a_layer_of_which_nothing_is_left():
    model = keras.Sequential([keras.Input((8,)), kv.VariationalDense(16, name="gone"), kv.VariationalDense(3)])
    model.layers[0].kernel.log_variance.assign(np.full((8, 16), 10.0))
    with pytest.warns(UserWarning, match="Nothing is left of gone"):
        small = kv.compact(model)
    assert small.layers[0].units == 1
    with pytest.warns(UserWarning, match="Nothing is left of gone"):
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
    with pytest.raises(RuntimeError, match="does not predict"):
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
    "branches": lambda h: layers.Add()([layers.Dense(5, "relu")(h), layers.Conv1D(5, 3, padding="same")(h)]),
    "joined": lambda h: layers.Concatenate()([h, layers.Dense(3, "sigmoid")(h)]),
    "residual": lambda h: layers.Add()([h, layers.Dense(h.shape[-1], "tanh")(h)]),
}


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
    with pytest.raises(ValueError, match="Pass `x=`"):
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
