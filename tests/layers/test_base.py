"""Bad input, and what Keras's own features make of a variational layer."""

import contextlib

import keras
import numpy as np
import pytest

import keras_vdrop as kv
from keras_vdrop.layers.weights import VariationalLayer
from tests.cases import array

DENSE = (kv.VariationalDense, {"units": 3})
CONV = (kv.VariationalConv2D, {"filters": 4, "kernel_size": 2})
CELL = (kv.VariationalLSTMCell, {"units": 3})
LSTM = (kv.VariationalLSTM, {"units": 3})

BAD = [
    (kv.MonteCarloDropout, {"rate": 0.5, "kl_weight": 0.5}),
    *[(cls, {"units": value}) for cls in (kv.VariationalDense, *CELL[:1], *LSTM[:1]) for value in (0, -1, 2.5, "3")],
    *[(kv.VariationalConv2D, {"kernel_size": 2, "filters": value}) for value in (0, -4, 2.5)],
    *[(cls, {**arguments, "estimator": "flipflop"}) for cls, arguments in (DENSE, CONV, CELL, LSTM)],
    *[(cls, {**arguments, "estimator": "local_reparameterization"}) for cls, arguments in (CELL, LSTM)],
    *[(cls, {**arguments, "kernel_prior": "lognormal"}) for cls, arguments in (DENSE, CONV, CELL, LSTM)],
    *[(cls, {**arguments, "bias_prior": "lognormal"}) for cls, arguments in (DENSE, CONV, CELL, LSTM)],
    *[(*DENSE[:1], {"units": 3, "kl_weight": value}) for value in (-1e-9, float("nan"), float("inf"), "1")],
    *[(*DENSE[:1], {"units": 3, "threshold": value}) for value in (float("nan"), float("-inf"))],
    *[(*DENSE[:1], {"units": 3, "initial_log_variance": value}) for value in (float("nan"), 100.0, -1e4)],
    (*DENSE[:1], {"units": 3, "seed": 1.5}),
    (*CONV[:1], {"filters": 4, "kernel_size": 2, "groups": 3}),
    *[(cls, {"units": 3, name: rate}) for cls in (CELL[0], LSTM[0]) for name in ("dropout",) for rate in (-0.1, 1.0)],
    (*CELL[:1], {"units": 3, "recurrent_dropout": 1.5}),
]


@pytest.mark.parametrize("cls, arguments", BAD, ids=str)
def test_bad_arguments_name_the_value(cls, arguments):
    name, value = list(arguments.items())[-1]
    with pytest.raises(ValueError) as error:
        cls(**arguments)
    assert str(value) in str(error.value) or name == "kl_weight"
    assert name in str(error.value) or "prior" in name


@pytest.mark.parametrize("cls, arguments, shape", [(*DENSE, (None,)), (*CONV, (8, 8, None)), (*LSTM, (5, None))])
def test_undefined_last_dimension(cls, arguments, shape):
    with pytest.raises(ValueError, match="None"):
        cls(**arguments)(keras.Input(shape))


def test_groups_that_do_not_divide_the_channels():
    with pytest.raises(ValueError, match="groups=2"):
        kv.VariationalConv2D(4, 2, groups=2)(keras.Input((8, 8, 3)))


def test_kl_weight_can_be_set_before_and_after_build():
    layer = kv.VariationalDense(3)
    layer.kl_weight = 0.25
    assert layer.get_config()["kl_weight"] == 0.25
    layer.build((None, 2))
    assert float(layer.kl_weight) == 0.25
    layer.kl_weight = 0.5
    np.testing.assert_allclose(array(sum(layer.losses)), 0.5 * array(layer.kernel.kl()), rtol=1e-6)
    with pytest.raises(ValueError, match="kl_weight=-1"):
        layer.kl_weight = -1


def test_without_priors_a_layer_is_plain():
    layer = kv.VariationalDense(3, kernel_prior=None)
    x = np.ones((2, 4), "float32")
    np.testing.assert_array_equal(array(layer(x, training=True)), array(layer(x)))
    assert isinstance(layer.kernel, keras.Variable) and not layer.losses and len(layer.weights) == 2


def test_a_prior_for_the_bias_alone():
    layer = kv.VariationalDense(3, kernel_prior=None, bias_prior="normal", kl_weight=1.0, initial_log_variance=0.0)
    x = np.zeros((50, 4), "float32")
    noise = array(layer(x, training=True))
    assert len(np.unique(noise)) == 150  # every example has a bias of its own
    np.testing.assert_allclose(array(sum(layer.losses)), 0.0, atol=1e-6)  # N(0, 1) to N(0, 1)


def test_bias_of_a_convolution_is_drawn_once_an_example():
    layer = kv.VariationalConv2D(2, 1, kernel_prior=None, bias_prior="normal", initial_log_variance=0.0, kl_weight=1.0)
    noise = array(layer(np.zeros((5, 3, 3, 1), "float32"), training=True))
    np.testing.assert_array_equal(noise, np.broadcast_to(noise[:, :1, :1], noise.shape))
    assert len(np.unique(noise)) == 10


class _Offset(keras.layers.Layer):
    """x + b with a scalar b, of which Keras does not ask the shape."""

    def build(self, input_shape):
        self.offset = self.add_weight(initializer="ones", name="offset")


class _VariationalOffset(VariationalLayer, _Offset):
    def call(self, x, training=False):
        return self._apply(self.offset, lambda x, b: x + b, x, self._noisy(training), "reparameterization")


def test_a_weight_without_a_shape_is_a_scalar():
    layer = _VariationalOffset(kernel_prior="normal", seed=0)
    x = np.zeros((4, 3), "float32")
    np.testing.assert_array_equal(array(layer(x)), 1.0)
    assert layer.offset.shape == ()
    drawn = array(layer(x, training=True))
    assert drawn[0, 0] != 1.0
    np.testing.assert_array_equal(drawn, drawn[0, 0])


def test_float64():
    """As wide as Keras's own layer is (JAX has no float64 unless it is switched on)."""
    layer, twin = kv.VariationalDense(3, dtype="float64", kl_weight=1.0), keras.layers.Dense(3, dtype="float64")
    x = np.ones((2, 4))
    assert layer(x, training=True).dtype == twin(x).dtype
    assert layer.kernel.log_variance.dtype == layer.kernel.loc.dtype == twin.kernel.dtype


def test_constraint_acts_on_the_mean():
    layer = kv.VariationalDense(3, kernel_constraint="non_neg", kl_weight=0.1)
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile("sgd", "mse")
    model.train_on_batch(np.ones((2, 4)), np.ones((2, 3)))
    assert array(layer.kernel.loc).min() >= 0 and array(layer.kernel.log_variance).min() < 0


def test_lora_and_quantization_are_refused():
    layer = kv.VariationalDense(3)
    layer.build((None, 2))
    with pytest.raises(ValueError, match="low-rank"):  # it has a distribution already
        layer.enable_lora(2)
    with pytest.raises(NotImplementedError, match="quantized"):
        layer.quantize("int8")


def test_layers_learn_by_name_and_by_class_what_they_are():
    assert isinstance(kv.VariationalDense(1), keras.layers.Dense)
    assert isinstance(kv.VariationalConv2D(1, 1), keras.layers.Conv2D)


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="MirroredStrategy is TensorFlow's")
def test_multi_replica_training():
    import subprocess
    import sys

    script = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras, numpy as np, keras_vdrop as kv
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(2, initial_log_variance=0.0)])
    model.compile("sgd", "mse", jit_compile=False)
history = model.fit(np.ones((8, 4)), np.ones((8, 2)), epochs=2, callbacks=[kv.ELBO(8)], verbose=0).history
assert np.isfinite(history["loss"]).all()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_rematerialisation_knows_of_consistent_sampling():
    """The second computation may come when the scope is over."""
    if keras.backend.backend() != "tensorflow":
        pytest.skip("GradientTape")
    import tensorflow as tf

    with keras.RematScope(mode="full"):
        layer = kv.VariationalDense(2, initial_log_variance=0.0, seed=1, kl_weight=0.1)
    x = np.ones((3, 4), "float32")
    layer(x)
    state = layer.seed_generator.state.numpy()
    gradients = []
    for inside in (True, False):
        layer.seed_generator.state.assign(state)
        with tf.GradientTape() as tape:
            with kv.sampling(consistent=True):
                output = keras.ops.sum(layer(x))
            with kv.sampling(consistent=True) if inside else contextlib.nullcontext():
                gradients.append(array(tape.gradient(output, layer.kernel.log_variance.variable.value)))
    np.testing.assert_allclose(*gradients, rtol=1e-5)
    assert np.abs(gradients[0]).max() > 0


def test_an_estimator_of_old_files_is_read_as_the_exact_one():
    """Its noise was two-valued and its variance in bfloat16, so that gradients through a second layer were biased."""
    config = {**kv.VariationalDense(3).get_config(), "estimator": "fast_local_reparameterization"}
    assert kv.VariationalDense.from_config(config).estimator == "local_reparameterization"


@pytest.mark.parametrize(
    "cls, arguments, answer",
    [
        (kv.VariationalDense, {"units": 3, "kernel_prior_fn": None}, "Pass `kernel_prior`"),
        (kv.VariationalDense, {"in_features": 4, "out_features": 3}, "finds the shape of its inputs"),
        (kv.VariationalConv2D, {"filters": 3, "kernel_size": 2, "kernel_divergence_fn": None}, "num_examples"),
        (
            kv.VariationalConv2D,
            {"filters": 3, "kernel_size": 2, "rate": 0.5},
            "`keras_vdrop.VariationalGaussianDropout`",
        ),
        (kv.VariationalEmbedding, {"input_dim": 3, "output_dim": 2, "prior": "ard"}, "Pass `kernel_prior`"),
        (kv.VariationalLSTM, {"units": 3, "dropoutw": 0.5}, "Pass `weight_dropout`"),
        (kv.VariationalGRUCell, {"units": 3, "num_examples": 5}, "keras_vdrop.ELBO"),
        (kv.VariationalGaussianDropout, {"p": 0.5}, "Pass `rate`"),
        (kv.MonteCarloDropout, {"rate": 0.5, "kernel_prior": "ard"}, "has no argument `kernel_prior`"),
        (kv.Variational, {"layer": keras.layers.Dense(3), "kernel_prior": "ard"}, "Pass `prior`"),
    ],
)
def test_arguments_of_other_libraries_are_answered(cls, arguments, answer):
    with pytest.raises(ValueError, match=f"{cls.__name__} has no argument") as error:
        cls(**arguments)
    assert answer in str(error.value)


def test_a_subclass_may_have_an_argument_of_another_library():
    class Dense(kv.VariationalDense):
        def __init__(self, units, *, prior_mean=0.0, **kwargs):
            super().__init__(units, **kwargs)

    assert Dense(3, prior_mean=1.0).units == 3
