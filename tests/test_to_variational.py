"""Conversion of Keras layers to variational layers, and of variational models to draws."""

import contextlib

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_vdrop as kv
from tests.cases import array, posteriors, randomize, stock
from tests.statistics import assert_mean, assert_variance


@keras.saving.register_keras_serializable(package="tests_of_conversion")
class Doubled(layers.Wrapper):
    """A user-defined wrapper."""

    def call(self, x):
        return 2.0 * self.layer(x)


@keras.saving.register_keras_serializable(package="tests_of_conversion")
class OwnCell(layers.Layer):
    """A user-defined RNN cell."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = self.state_size = units

    def build(self, input_shape):
        self.kernel = self.add_weight((input_shape[-1], self.units), name="kernel")

    def call(self, x, states):
        h = ops.tanh(ops.matmul(x, self.kernel) + states[0])
        return h, [h]

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="tests_of_conversion")
class OwnDense(layers.Layer):
    """A user-defined layer without a counterpart, whose weight `w` has none of the names that Keras uses."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, input_shape):
        self.w = self.add_weight((input_shape[-1], self.units), name="w")

    def call(self, x):
        return ops.matmul(x, self.w)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="tests_of_conversion")
class Block(layers.Layer):
    """A user-defined block that creates its sublayers in its constructor."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.attention = layers.MultiHeadAttention(2, 3, dropout=0.1)
        self.normalization = layers.BatchNormalization()
        self.dense = layers.Dense(units, activation="tanh")

    def call(self, x, training=False):
        return self.dense(self.normalization(self.attention(x, x), training=training))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="tests_of_conversion")
class Subclassed(keras.Model):
    """A subclassed model, whose `call` connects its layers."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)
        self.normalization = layers.BatchNormalization()

    def call(self, x, training=False):
        return self.normalization(self.dense(x), training=training)


def sequential():
    return keras.Sequential(
        [
            keras.Input((6, 5, 2)),
            layers.Conv2D(3, 3, padding="same", kernel_regularizer="l2", name="conv"),
            layers.SeparableConv2D(4, 2, activation="relu"),
            layers.SpatialDropout2D(0.5),
            layers.Conv2DTranspose(2, 2),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(3, kernel_constraint="non_neg", activation="softmax"),
        ]
    )


def branches():
    """Return a model with two inputs, two named outputs, a layer called twice, and operations that are not layers."""
    inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((4,), name="b")}
    shared = layers.Dense(5, activation="tanh", name="shared")
    a, b = shared(inputs["a"]), shared(inputs["b"])
    h = layers.LayerNormalization()(ops.concatenate([a, b * 2.0]))
    outputs = {"sum": layers.Dense(1, name="first")(h), "rest": layers.Softmax()(layers.Dense(2, name="second")(a + b))}
    return keras.Model(inputs, outputs)


def nested():
    """Return a model with two inner models and a layer that both of them and the outer model share."""
    shared = layers.Dense(4, name="shared")
    one = keras.Sequential([keras.Input((4,)), shared, layers.BatchNormalization()], name="one")
    x = keras.Input((4,), name="x")
    other = keras.Model(x, layers.Dense(4, name="own")(shared(x)), name="other")
    return keras.Model(x, one(other(shared(x))))


def words():
    """Return a model with masks, recurrent layers and attention."""
    x = keras.Input((None,), dtype="int32")
    h = layers.Embedding(9, 4, mask_zero=True)(x)
    h = layers.LSTM(3, return_sequences=True, dropout=0.2)(h)
    h = layers.MultiHeadAttention(2, 2)(h, h, use_causal_mask=True)
    backward = layers.GRU(3, activation="relu", go_backwards=True, name="backward_gru")
    return keras.Model(x, layers.Bidirectional(layers.GRU(3), backward_layer=backward, name="both")(h))


def wrappers():
    x = keras.Input((3,))
    inside = keras.Model(x, layers.Dense(3)(layers.Dense(4)(x)))
    return keras.Sequential(
        [
            keras.Input((4, 3)),
            layers.TimeDistributed(inside),
            Doubled(layers.EinsumDense("btd,de->bte", (None, 5), bias_axes="e")),
            layers.SpectralNormalization(layers.Conv1D(3, 2)),
            layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)], return_sequences=True),
            layers.RNN(layers.SimpleRNNCell(4)),
        ]
    )


def others():
    """Return a model of layers that have no counterpart, some of them in wrappers."""
    x = keras.Input((4, 6))
    h = layers.RNN(OwnCell(3, name="own"), return_sequences=True, name="rnn")(Block(6, name="block")(x))
    h = layers.TimeDistributed(OwnDense(4, name="own_dense"), name="each")(h)
    h = layers.Bidirectional(layers.RNN(OwnCell(2), return_sequences=True), name="both")(h)
    h = layers.GroupQueryAttention(2, 2, 1, name="grouped")(h, h)
    return keras.Model(x, layers.DepthwiseConv1D(2, name="depthwise")(h))


def subclassed():
    model = Subclassed()
    model(np.zeros((2, 4), "float32"))
    return model


MODELS = [sequential, branches, nested, words, wrappers, others, subclassed]


def data(model):
    """Return random inputs for a model."""
    rng = np.random.default_rng(0)

    def one(x):
        shape = [3, *(5 if size is None else size for size in x.shape[1:])]
        return (
            rng.integers(0, 9, shape).astype("int32") if "int" in x.dtype else rng.normal(size=shape).astype("float32")
        )

    if isinstance(model, Subclassed):
        return rng.normal(size=(3, 4)).astype("float32")
    return keras.tree.map_structure(one, model.inputs[0] if isinstance(model, keras.Sequential) else model.input)


def shake(model):
    """Move every floating-point weight away from its initial value, as training would."""
    rng = np.random.default_rng(1)
    for variable in model.weights:
        if "float" in variable.dtype:
            variable.assign(array(variable) + rng.uniform(0.1, 0.3, variable.shape))


def assert_same(one, *others):
    """Assert that the models predict the same, within 1e-6."""
    x = data(one)
    expected = [array(each) for each in keras.tree.flatten(one(x))]
    for model in others:
        for found, wanted in zip(keras.tree.flatten(model(x)), expected):
            np.testing.assert_allclose(array(found), wanted, rtol=1e-6, atol=1e-6)


@contextlib.contextmanager
def left_alone(model):
    """Assert that the code in the context does not change the model."""

    def state():
        layers_within = model._flatten_layers()
        return {
            "config": model.get_config(),
            "ids": [id(each) for each in (*layers_within, *model.variables)],
            "compiled with": [id(getattr(model, name, None)) for name in ("optimizer", "loss", "_compile_metrics")],
            "trainable": [each.trainable for each in (*layers_within, *model.variables)],
            "compiled": [getattr(each, "compiled", None) for each in layers_within],
            "calls": [len(each._inbound_nodes) for each in layers_within],
            "regularizers": [id(each.regularizer) for each in model.weights],
        }

    def values():
        of_optimizer = model.optimizer.variables if model.compiled else []
        return [array(each) for each in (*model.variables, *model.metrics_variables, *of_optimizer)]

    before, weights = state(), values()
    yield
    assert state() == before
    for found, expected in zip(values(), weights):
        np.testing.assert_array_equal(found, expected)


def converted(model, *args, **kwargs):
    """Return the model that `to_variational` makes and the lines it prints, and assert that `model` is unchanged."""
    lines = []
    with left_alone(model):
        return kv.to_variational(model, *args, print_fn=lines.append, **kwargs), lines


def classes(model):
    return {type(layer).__name__ for layer in model._flatten_layers()}


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("make", MODELS)
def test_the_same_function_and_back(make, tmp_path):
    model = make()
    shake(model)
    model.compile("sgd", keras.losses.MeanSquaredError())
    twin, _ = converted(model)
    assert posteriors(twin) and twin.compiled and twin.optimizer is not model.optimizer
    for weight in posteriors(twin):
        np.testing.assert_array_equal(array(weight.prior_parameters["center"]), array(weight.loc))
    assert twin.name == model.name
    if make is not subclassed:
        assert [layer.name for layer in twin.layers] == [layer.name for layer in model.layers]
    twin.save(tmp_path / "twin.keras")
    back = kv.to_deterministic(keras.saving.load_model(tmp_path / "twin.keras"))
    assert stock(back)
    assert_same(model, twin, back)
    again, lines = converted(twin)
    assert again is twin and "already variational" in lines[0]


def test_classes_and_report():
    twin, lines = converted(words())
    assert not {"Embedding", "LSTM", "GRU", "MultiHeadAttention"} & classes(twin)
    assert "both/backward_gru: GRU -> VariationalGRU" in lines
    twin, lines = converted(wrappers())
    assert not {"Dense", "EinsumDense", "Conv1D", "LSTMCell", "GRUCell", "SimpleRNNCell"} & classes(twin)
    assert {"Doubled", "SpectralNormalization", "StackedRNNCells", "TimeDistributed"} <= classes(twin)
    twin, lines = converted(others())
    for name in ("block: Block", "rnn: RNN", "each/own_dense: OwnDense", "both: Bidirectional"):
        assert any(line.startswith(f"{name} -> Variational(") for line in lines), lines
    assert any("center" in line and "does not prune" in line for line in lines)
    assert lines[-1].endswith("weights are distributions now")


def test_shared_layers_stay_shared():
    twin, lines = converted(branches())
    assert sum(line.startswith("shared: ") for line in lines) == 1
    assert len(posteriors(twin)) == 3
    twin, lines = converted(nested())
    assert [line.split(":")[0] for line in lines[:2]] == ["shared", "other/own"]
    assert len(posteriors(twin)) == 2


# Which layers


@pytest.mark.parametrize(
    "wanted, found",
    [
        (layers.Conv2D, ["conv"]),
        ((layers.Conv2D, layers.SeparableConv2D), ["conv", "separable_conv2d"]),
        ("^conv", ["conv", "conv2d_transpose"]),
        (["^conv$", "dense"], ["conv", "dense"]),
        (lambda layer: layer.name == "conv", ["conv"]),
        ("last", ["dense"]),
    ],
)
def test_layers(wanted, found):
    twin, lines = converted(sequential(), wanted)
    assert [line.split(":")[0] for line in lines if "->" in line] == found
    assert lines[len(found)].startswith(f"{4 - len(found)} of the layers")
    assert_same(twin, kv.to_deterministic(twin))


def test_last_of_each_output():
    def last(model):
        return [line.split(":")[0] for line in converted(model, "last")[1] if "->" in line]

    assert sorted(last(branches())) == ["first", "second"]
    assert last(nested()) == ["shared"]
    x = keras.Input((4,))
    h = layers.Dense(3, name="a")(x) + layers.Dropout(0.5)(layers.Dense(3, name="b")(x))
    assert sorted(last(keras.Model(x, layers.Activation("relu")(h)))) == ["a", "b"]


def test_within_wrappers():
    for model, wrapper in ((wrappers(), layers.TimeDistributed), (words(), layers.Bidirectional)):
        _, lines = converted(model, wrapper)
        assert sum("->" in line for line in lines) == 2


# Priors and variances


def test_priors():
    model = sequential()
    shake(model)
    twin, lines = converted(model, prior=kv.priors.Normal(0.5), empirical_bayes=False, bias_prior="ard")
    kernel = twin.get_layer("conv").kernel
    assert not kernel.prior.centered and kernel.prior.scale == 0.5
    assert isinstance(twin.get_layer("conv").bias.prior, kv.priors.ARD)
    assert "centered on 0" in lines[-2]
    twin, lines = converted(model, prior="log_uniform")
    assert "it prunes" in lines[-2]
    twin, lines = converted(model, prior="scale_mixture")
    assert "cannot be centered" in lines[-2]
    with pytest.raises(ValueError, match="`prior` must not be None"):
        kv.to_variational(model, prior=None)
    with pytest.raises(ValueError, match=r"ARD.*does not fit conv \(Conv2D\)"):
        kv.to_variational(model, prior=kv.priors.ARD(group_axis=4))


def test_variances():
    model = sequential()
    shake(model)
    twin, _ = converted(model, relative_variance=0.04)
    kernel = twin.get_layer("conv").kernel
    np.testing.assert_allclose(array(kernel.log_alpha()), np.log(0.04), rtol=1e-4)
    twin, _ = converted(model, initial_log_variance=-7.0)
    np.testing.assert_allclose(array(twin.get_layer("conv").kernel.log_variance.value), -7.0, rtol=1e-6)
    twin, _ = converted(model)
    kernel = twin.get_layer("conv").kernel
    expected = np.log(np.mean(array(kernel.loc) ** 2)) + kernel.prior.start
    np.testing.assert_allclose(array(kernel.log_variance.value), expected, rtol=1e-5)


def test_arguments():
    twin, _ = converted(words(), estimator="local_reparameterization", kl_weight=0.01, threshold=2.0)
    assert {layer.estimator for layer in twin.layers if hasattr(layer, "estimator")} == {"local_reparameterization"}
    assert twin.layers[2].cell.estimator == "auto" and twin.layers[2].cell.threshold == 2.0
    assert float(twin.layers[1].kl_weight) == pytest.approx(0.01)


def test_low_rank_updates():
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(9, 5),
            layers.Conv1D(4, 2, name="conv"),
            layers.GRU(3, return_sequences=True, name="gru"),
            layers.EinsumDense("btd,de->bte", (None, 4), bias_axes="e"),
            layers.Dense(2, name="dense"),
        ]
    )
    shake(model)
    model.get_layer("dense").trainable = False
    twin, lines = converted(model, rank=2, lora_alpha=4)
    assert "gru: GRU -> Variational(GRU), because its counterpart cannot learn a low-rank update" in lines
    assert "it cannot" not in lines[-2] and "in updates of rank 2" in lines[-1]
    names = [weight.name for weight in posteriors(twin)]
    assert sorted(names) == ["kernel_lora_a", *["lora_a"] * 4, "recurrent_kernel_lora_a"]
    assert_same(model, twin, kv.to_deterministic(twin))
    conv = twin.get_layer("conv")
    assert not conv.kernel.trainable and conv.bias.trainable
    for weight in posteriors(twin):
        weight.update.b.assign(np.random.default_rng(0).normal(size=weight.update.b.shape))
    x, back = data(model), kv.to_deterministic(twin)
    assert not np.allclose(array(twin(x)), array(model(x)), atol=1e-3)
    np.testing.assert_allclose(array(back(x)), array(twin(x)), rtol=1e-5, atol=1e-5)
    assert stock(back) and not any(getattr(layer, "lora_rank", None) for layer in back.layers)
    assert back.get_layer("conv").kernel.trainable and not back.get_layer("dense").kernel.trainable
    drawn = kv.to_deterministic(twin, sample=True)
    assert not np.allclose(array(drawn(x)), array(twin(x)), atol=1e-3)


# Other properties that conversion keeps


def test_what_is_frozen():
    model = nested()
    model.get_layer("one").trainable = False
    model.get_layer("other").get_layer("own").kernel.trainable = False
    twin, lines = converted(model)
    assert not twin.get_layer("one").trainable and twin.get_layer("other").trainable
    assert len(twin.trainable_variables) == len(model.trainable_variables) == 1  # the bias of "own"
    assert sum("frozen" in line for line in lines) == 2
    twin.get_layer("one").trainable = True
    assert twin.get_layer("shared").kernel.log_variance.trainable
    assert len(kv.to_deterministic(twin).trainable_variables) == 5


def test_policies_and_states():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3, dtype="mixed_bfloat16"),
            layers.Normalization(),
            layers.Dropout(0.5, seed=1),
            layers.Dense(2, dtype="float64"),
        ]
    )
    model.layers[1].adapt(np.random.default_rng(0).normal(2.0, 3.0, (20, 3)))
    model(np.zeros((2, 4), "float32"), training=True)  # advances the state of the dropout's seed generator
    twin, _ = converted(model)
    assert [layer.dtype_policy.name for layer in twin.layers] == [layer.dtype_policy.name for layer in model.layers]
    states = [array(each.layers[2].seed_generator.state) for each in (model, twin)]
    np.testing.assert_array_equal(*states)
    assert_same(model, twin)


def test_states_and_lambdas():
    x = keras.Input(batch_shape=(3, 5, 2))
    model = keras.Model(x, layers.Lambda(lambda h: 2.0 * h)(layers.LSTM(4, stateful=True)(x)))
    model(data(model))
    assert_same(model, converted(model)[0])


class OwnLoss:
    """A loss that cannot be serialized to a config."""

    def __call__(self, y, outputs):
        return ops.mean(ops.square(y - outputs))


def test_compiled():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    loss, metric = OwnLoss(), keras.metrics.MeanAbsoluteError(name="own")
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 10), clipnorm=1.0)
    model.compile(optimizer, loss, metrics=["mse", metric], run_eagerly=True)
    x, y = data(model), np.zeros((3, 3), "float32")
    model.fit(x, y, verbose=0)
    twin, _ = converted(model)
    assert twin.loss is loss and twin.run_eagerly
    assert twin.optimizer.get_config() == model.optimizer.get_config() and twin.optimizer is not model.optimizer
    assert int(array(twin.optimizer.iterations)) == 0
    before = [array(each) for each in model.metrics_variables]
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    found = twin.evaluate(x, y, verbose=0, return_dict=True)
    assert set(found) == set(expected) and found["own"] == pytest.approx(expected["own"], rel=1e-5)
    assert len(before) == len(model.metrics_variables)
    history = twin.fit(x, y, verbose=0, callbacks=[kv.ELBO(3, labels_per_example=1)]).history
    assert "kl" in history


def test_not_compiled_as_it_was():
    class OwnOptimizer(keras.optimizers.SGD):
        def get_config(self):
            raise NotImplementedError("none")

    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.compile(OwnOptimizer(), "mse")
    lines = []
    twin = kv.to_variational(model, print_fn=lines.append)
    assert not twin.compiled and any(line.startswith("not compiled: ") for line in lines)


def test_steps_of_ones_own():
    class OwnSteps(keras.Model):
        def __init__(self, units):
            x = keras.Input((4,))
            super().__init__(x, layers.Dense(units)(x))

        def train_step(self, *args):
            return super().train_step(*args)

    lines = []
    kv.to_variational(OwnSteps(2), print_fn=lines.append)
    assert any("OwnSteps defines its own training steps or losses" in line for line in lines)


def test_what_is_variational_already_stays_as_it_is():
    model = keras.Sequential([keras.Input((3,)), kv.VariationalDense(4, name="ours"), layers.Dense(2, name="theirs")])
    randomize(model)
    model.layers[0].kl_weight = 0.25
    model.layers[0].kernel.prune(0.0)
    twin, lines = converted(model)
    assert "ours: VariationalDense stays: it is already variational" in lines
    for found, expected in zip(twin.layers[0].weights, model.layers[0].weights):
        np.testing.assert_array_equal(array(found), array(expected))
    assert_same(model, twin)


# Dropout


def dropouts():
    return keras.Sequential(
        [
            keras.Input((6, 3)),
            layers.SpatialDropout1D(0.25, seed=3, name="spatial"),
            layers.Dropout(0.5, noise_shape=(None, 1, None), name="shape"),
            layers.GaussianDropout(0.2, name="gaussian"),
            layers.TimeDistributed(layers.Dropout(0.5), name="each"),
            layers.AlphaDropout(0.5, name="alpha"),
            layers.Dropout(0.0, name="none"),
        ]
    )


def test_dropout_that_can_be_sampled():
    twin, lines = converted(dropouts(), dropout="monte_carlo")
    spatial, shape, gaussian, each, alpha, none = twin.layers
    assert isinstance(spatial, kv.MonteCarloDropout) and spatial.noise_shape == (None, 1, None)
    assert (spatial.rate, spatial.seed) == (0.25, 3)
    assert isinstance(shape, kv.MonteCarloDropout) and shape.noise_shape == (None, 1, None)
    assert isinstance(gaussian, kv.VariationalGaussianDropout) and (gaussian.alpha, gaussian.rate) == ("fixed", 0.2)
    assert isinstance(each.layer, kv.MonteCarloDropout) and isinstance(none, kv.MonteCarloDropout)
    assert type(alpha) is layers.AlphaDropout and any(line.startswith("alpha: AlphaDropout stays") for line in lines)
    with kv.sampling():
        drawn = array(twin(np.ones((50, 6, 3), "float32")))
    assert drawn.std() > 0.1


def test_dropout_that_learns():
    twin, lines = converted(dropouts(), dropout="variational", kl_weight=0.01)
    for layer, rate in zip(twin.layers[:3], (0.25, 0.5, 0.2)):
        assert isinstance(layer, kv.VariationalGaussianDropout) and (layer.alpha, layer.rate) == ("unit", rate)
        assert float(layer.kl_weight) == pytest.approx(0.01)
    assert sum("stays" in line for line in lines) == 3


# Draws


def test_draws_fit_the_posterior():
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(30, bias_prior="normal"), layers.Dense(2)])
    randomize(model, (-4.0, 0.0))
    kernel = model.layers[0].kernel
    kernel.mask.assign(np.arange(30) % 3 > 0 * np.ones((4, 1)))
    members = [kv.to_deterministic(model, sample=True, seed=seed) for seed in range(60)]
    assert all(map(stock, members))
    for weight, drawn in zip(posteriors(model), zip(*(member.layers[0].get_weights() for member in members))):
        left, drawn = array(weight.mask).astype(bool), np.stack(drawn)
        assert not drawn[:, ~left].any()
        assert_mean(drawn[:, left], array(weight.loc)[left])
        assert_variance(drawn[:, left], np.exp(array(weight.log_variance.value))[left])
    np.testing.assert_array_equal(members[0].layers[1].kernel, model.layers[1].kernel)
    again = kv.to_deterministic(model, sample=True, seed=0)
    for one, other in zip(again.get_weights(), members[0].get_weights()):
        np.testing.assert_array_equal(one, other)


def test_a_draw_of_noise():
    model = keras.Sequential([keras.Input((5,)), kv.VariationalGaussianDropout(0.5), kv.MonteCarloDropout(0.5)])
    drawn = kv.to_deterministic(model, sample=True, seed=0)
    assert [type(layer) for layer in drawn.layers] == [layers.Rescaling, layers.Dropout]
    assert array(drawn(np.ones((1, 5), "float32"))).std() > 0.1


# Names


def test_names():
    x = keras.Input((4, 6))
    h = kv.VariationalDense(3, name="variational_dense")(x)
    h = kv.VariationalDense(3, name="variational_dense_7")(h)
    h = layers.Dense(3, name="dense_7")(h)
    h = kv.ConcreteDropout(layers.Dense(3, name="inside"), name="concrete_dropout_2")(h)
    h = layers.TimeDistributed(kv.VariationalDense(3, name="variational_dense_9"), name="each")(h)
    h = kv.Variational(OwnDense(3, name="whole"))(h)
    h = kv.VariationalDense(3, name="mine")(h)
    model = keras.Model(x, layers.Bidirectional(kv.VariationalLSTM(2, name="variational_lstm"), name="both")(h))
    twin = kv.to_deterministic(model)
    names = ["dense", "variational_dense_7", "dense_7", "inside", "each", "whole", "mine", "both"]
    assert [layer.name for layer in twin.layers[1:]] == names
    assert twin.get_layer("each").layer.name == "dense_9"
    assert twin.get_layer("both").forward_layer.name == "forward_lstm"
    assert [layer.name for layer in kv.compact(model).layers[1:]] == names


# Models and arguments that are refused


def test_bad_arguments():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="dense")])
    for arguments, match in [
        (dict(initial_log_variance=-3.0, relative_variance=0.1), "not both"),
        (dict(relative_variance=0.0), "`relative_variance` must be > 0"),
        (dict(rank=0), "`rank` must be a positive int"),
        (dict(dropout="all"), "`dropout` must be one of"),
        (dict(estimator="none"), "`estimator` must be one of"),
        (dict(kl_weight=-1.0), "`kl_weight` must be"),
        (dict(prior="none"), "Unknown prior"),
        (dict(layers="conv"), r"must match a layer .*: dense \(Dense\)"),
        (dict(layers="("), "valid regular expression"),
        (dict(layers=3), "`layers` must be a layer class"),
        (dict(layers=keras.losses.Loss), "`layers` must be a layer class"),
        (dict(layers=[]), "nothing to convert"),
    ]:
        with pytest.raises(ValueError, match=match):
            kv.to_variational(model, **arguments)


def test_bad_models():
    with pytest.raises(ValueError, match=r"must be a keras\.Model"):
        kv.to_variational(layers.Dense(2))
    with pytest.raises(ValueError, match="has not been built"):
        kv.to_variational(keras.Sequential([layers.Dense(2)]))
    with pytest.raises(ValueError, match="nothing to convert"):
        kv.to_variational(keras.Sequential([keras.Input((3,)), layers.ReLU()]))
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="dense")])
    model.quantize("int8")
    with pytest.raises(ValueError, match="'dense', a Dense, is quantized"):
        kv.to_variational(model)


def test_low_rank_adaptations_stay():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="adapted"), layers.Dense(2, name="plain")])
    model.layers[0].enable_lora(1)
    shake(model)
    twin, lines = converted(model)
    assert lines[0].startswith("adapted: Dense stays: it has a low-rank adaptation")
    assert_same(model, twin)
    with pytest.raises(ValueError, match=r"nothing to convert(.|\n)*adapted.*low-rank"):
        kv.to_variational(model, "adapted")


class Halved(keras.Model):
    """A functional model with a `call` of its own."""

    def __init__(self):
        x = keras.Input((3,))
        super().__init__(x, layers.Dense(3)(x), name="halved")

    def call(self, x, training=None):
        return 0.5 * super().call(x, training=training)


def test_models_whose_call_a_copy_would_not_have():
    x = keras.Input((3,))
    with pytest.raises(ValueError, match="'halved', a Halved, overrides `call`"):
        kv.to_variational(keras.Model(x, Halved()(x)))


class Unknown(layers.Layer):
    """A layer that cannot be recreated from its config."""

    def __init__(self, function):
        super().__init__(name="unknown")
        self.function = function

    def build(self, input_shape):
        self.kernel = self.add_weight((input_shape[-1], 2))

    def call(self, x):
        return self.function(ops.matmul(x, self.kernel))


def test_layers_that_cannot_be_made_again():
    model = keras.Sequential([keras.Input((3,)), Unknown(ops.tanh), layers.Dense(2)])
    with pytest.raises(ValueError, match=r"'unknown', a Unknown, cannot be recreated.*register_keras_serializable"):
        kv.to_variational(model)
    with pytest.raises(ValueError, match=r"'unknown', a Unknown, cannot be recreated"):
        kv.to_variational(model, "dense")
    dense = layers.Dense(3)
    x = keras.Input((2, 3))
    model = keras.Model(x, dense(layers.TimeDistributed(dense)(x)))
    with pytest.raises(ValueError, match="a layer within a wrapper is also used outside it"):
        kv.to_variational(model)
    if keras.backend.backend() == "tensorflow":
        lookup = layers.IntegerLookup(vocabulary=[1, 2], name="lookup")
        model = keras.Sequential([keras.Input((3,), dtype="int64"), lookup, layers.Embedding(4, 2)])
        with pytest.raises(ValueError, match="vocabulary of 'lookup' is neither"):
            kv.to_variational(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.Bidirectional(layers.LSTM(3), name="outer"),
        lambda: layers.RNN(layers.LSTMCell(3), name="outer"),
        lambda: layers.RNN([layers.GRUCell(3), layers.LSTMCell(2)], name="outer"),
        lambda: layers.TimeDistributed(layers.DepthwiseConv1D(2), name="outer"),
    ],
)
def test_low_rank_of_layers_without_it_within_a_wrapper(make):
    """Recurrent wrappers need attributes that `Variational` lacks, so `Variational` wraps the whole wrapper."""
    shape = (4, 6, 5) if "TimeDistributed" in type(make()).__name__ else (4, 5)
    model = keras.Sequential([keras.Input(shape), make()])
    shake(model)
    twin, lines = converted(model, rank=2)
    assert any("-> Variational(" in line for line in lines)
    assert all(weight.update is not None for weight in posteriors(twin))
    assert_same(model, twin, kv.to_deterministic(twin))


def test_a_kl_weight_that_was_never_set_is_not_set_by_training_and_conversion():
    model = keras.Sequential([keras.Input((3,)), kv.VariationalDense(4, name="ours"), layers.Dense(2)])
    with pytest.warns(UserWarning, match="was never set"):
        model(np.ones((2, 3), "float32"), training=True)
    twin, _ = converted(model)
    with pytest.warns(UserWarning, match="was never set"):
        twin(np.ones((2, 3), "float32"), training=True)
