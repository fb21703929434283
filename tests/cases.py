"""Test cases for every public layer: arguments, an input and the Keras twin. All conformance tests run over them."""

import dataclasses

import keras
import numpy as np
from keras import layers

import keras_vdrop as kv
from keras_vdrop.layers.weights import VariationalLayer
from keras_vdrop.posterior import VariationalWeight
from keras_vdrop.posterior import posteriors as all_posteriors


@dataclasses.dataclass(frozen=True)
class Case:
    """One of our layers, configured for the conformance tests.

    Attributes:
        name: Name of the case.
        cls: Class of our layer.
        twin: Keras layer that our layer equals without noise. For a wrapper, the layer that it wraps.
        shape: Shape of an input, including the batch axis.
        keras: Arguments of both layers.
        ours: Arguments of our layer only.
        vocabulary: Number of indices if the inputs are indices, else 0.
        has_kl: Whether the layer has a KL.
    """

    name: str
    cls: type
    twin: type
    shape: tuple
    keras: dict
    ours: dict = dataclasses.field(default_factory=dict)
    vocabulary: int = 0
    has_kl: bool = True

    def make(self, **arguments):
        """Return our layer: a cell inside `keras.layers.RNN`, a wrapper around its Keras layer."""
        weight = {} if issubclass(self.cls, kv.MonteCarloDropout) else {"kl_weight": 0.01}
        ours = {**weight, **self.ours, **arguments}
        if self.is_wrapper:
            dtype = {"dtype": ours["dtype"]} if "dtype" in ours else {}
            if self.cls is kv.Variational:
                ours.pop("dtype", None)  # `Variational` has no such argument
            return self.cls(self.twin(**self.keras, **dtype), **ours)
        layer = self.cls(**{**self.keras, **ours})
        return layers.RNN(layer, dtype=arguments.get("dtype")) if self.is_cell else layer

    def make_twin(self, dtype=None):
        """Return the Keras layer with the same arguments: a cell inside `keras.layers.RNN`."""
        layer = self.twin(**self.keras, dtype=dtype)
        return layers.RNN(layer, dtype=dtype) if self.is_cell else layer

    def call(self, layer, x, **arguments):
        """Call the layer on an input. Attention layers attend from the input to itself."""
        return layer(x, x, **arguments) if self.is_attention else layer(x, **arguments)

    def input(self, shape=None):
        """Return a symbolic input."""
        return keras.Input((shape or self.shape)[1:], dtype="int32" if self.vocabulary else None)

    def model(self, layer=None, **arguments):
        """Return a model that consists of the layer only."""
        x = self.input()
        return keras.Model(x, self.call(layer or self.make(**arguments), x))

    def inputs(self, seed=0, shape=None):
        rng = np.random.default_rng(seed)
        if self.vocabulary:
            return rng.integers(0, self.vocabulary, size=shape or self.shape).astype("int32")
        return rng.normal(size=shape or self.shape).astype("float32")

    def built(self, **arguments):
        """Return our layer after building it."""
        layer = self.make(**arguments)
        self.call(layer, self.inputs())
        return layer

    def replace(self, **ours):
        """Return the case with some of the arguments in `ours` replaced."""
        return dataclasses.replace(self, ours={**self.ours, **ours})

    def with_prior(self, prior):
        """Return the case with `prior` as its kernel prior, and as its bias prior if it sets one."""
        names = [name for name in ("kernel_prior", "prior") if name in self.own_arguments]
        return self.replace(**dict.fromkeys([*names, *({"bias_prior"} & set(self.ours))], prior))

    @property
    def own_arguments(self):
        """Names of the arguments that the Keras layer does not have."""
        if issubclass(self.cls, VariationalLayer) or self.is_rnn:
            return (
                *("kernel_prior", "bias_prior", "estimator", "kl_weight"),
                *("initial_log_variance", "log_variance_rate", "threshold", "seed"),
            )
        return {
            kv.VariationalGaussianDropout: ("rate", "alpha", "prior", "axis", "kl_weight", "threshold", "seed"),
            kv.ConcreteDropout: ("initial_rate", "temperature", "prior_scale", "spatial", "kl_weight", "seed"),
            kv.MonteCarloDropout: ("rate", "noise_shape", "per_example", "seed"),
            kv.Variational: (
                *("include", "exclude", "prior", "kl_weight"),
                *("initial_log_variance", "log_variance_rate", "threshold", "lora_rank", "lora_alpha", "seed"),
                "dropout",
            ),
        }[self.cls]

    @property
    def is_rare(self):
        """Whether the case runs with `pytest --full` only."""
        return self.name not in TYPICAL

    @property
    def is_cell(self):
        """Whether the layer is an RNN cell."""
        return self.name.endswith("_cell")

    @property
    def is_rnn(self):
        """Whether the layer is a complete RNN layer."""
        return issubclass(self.cls, layers.RNN)

    @property
    def is_wrapper(self):
        return issubclass(self.cls, (layers.Wrapper, kv.Variational))

    @property
    def is_attention(self):
        return issubclass(self.cls, layers.MultiHeadAttention)

    @property
    def is_kernel(self):
        """Whether the layer is one of our classes with variational weights (wrappers and dropout layers are not)."""
        return issubclass(self.cls, VariationalLayer) or self.is_rnn

    def __str__(self):
        return self.name


def case(name, cls, shape, keras_arguments, ours=None, **more):
    """Return a case whose twin is by default the Keras layer that the class extends."""
    twin = next((base for base in cls.__mro__ if base.__module__.startswith("keras.")), None)
    return Case(name, cls, more.pop("twin", twin), shape, keras_arguments, ours or {}, **more)


def block(units, dtype=None):
    """Return a model to use as a layer: attention, a residual connection, normalization and a dense layer."""
    x = keras.Input((4, 6))
    attended = layers.MultiHeadAttention(2, 3, dtype=dtype)(x, x)
    normalized = layers.LayerNormalization(dtype=dtype)(layers.Add(dtype=dtype)([x, attended]))
    return keras.Model(x, layers.Dense(units, activation="tanh", dtype=dtype)(normalized))


GAUSSIAN = (kv.VariationalGaussianDropout, layers.Identity)
CONCRETE = kv.ConcreteDropout
# By default, tests that run over `CASES` run over these only, one of each family; with `pytest --full`, over all.
TYPICAL = (
    *("dense", "conv_2d_strides", "embedding_mask", "attention", "lstm", "variational_dense"),
    *("gaussian_dropout", "concrete_dropout", "monte_carlo_dropout"),
)
FLIPOUT, ONE_DRAW = {"estimator": "flipout"}, {"estimator": "reparameterization"}

CASES = [
    case("dense", kv.VariationalDense, (4, 5), {"units": 3, "activation": "tanh"}),
    case("dense_sequence", kv.VariationalDense, (4, 2, 5), {"units": 3}, {"bias_prior": "ard", **FLIPOUT}),
    case("dense_one_draw", kv.VariationalDense, (4, 5), {"units": 3, "use_bias": False}, ONE_DRAW),
    case(
        "dense_normal",
        kv.VariationalDense,
        (4, 5),
        {"units": 3},
        {"kernel_prior": kv.priors.Normal(0.3, trainable=True), "bias_prior": kv.priors.Normal(0.5)},
    ),
    case(
        "einsum_dense",
        kv.VariationalEinsumDense,
        (4, 3, 5),
        {"equation": "abc,cde->abde", "output_shape": (3, 2, 3), "bias_axes": "de"},
        {"kernel_prior": "scale_mixture", "bias_prior": "normal", **FLIPOUT},
    ),
    case(
        "conv_1d",
        kv.VariationalConv1D,
        (3, 6, 4),
        {"filters": 3, "kernel_size": 3, "padding": "causal", "dilation_rate": 2},
        {"kernel_prior": kv.priors.ARD(group_axis=-1), "bias_prior": "ard"},
    ),
    case("conv_2d", kv.VariationalConv2D, (3, 6, 5, 4), dict(filters=6, kernel_size=3, padding="same", groups=2)),
    case(
        "conv_2d_strides",
        kv.VariationalConv2D,
        (3, 6, 5, 2),
        {"filters": 3, "kernel_size": (3, 2), "strides": 2, "activation": "relu"},
        {"bias_prior": "normal", **FLIPOUT},
    ),
    case(
        "conv_2d_dilation",
        kv.VariationalConv2D,
        (3, 2, 6, 7),
        {"filters": 3, "kernel_size": 2, "dilation_rate": 2, "data_format": "channels_first"},
        {"kernel_prior": "ard", "bias_prior": "ard", **ONE_DRAW},
    ),
    case("conv_3d", kv.VariationalConv3D, (2, 4, 3, 3, 2), {"filters": 3, "kernel_size": 2}, {"bias_prior": "ard"}),
    case("conv_1d_transpose", kv.VariationalConv1DTranspose, (3, 4, 2), dict(filters=3, kernel_size=3, strides=2)),
    case(
        "conv_2d_transpose",
        kv.VariationalConv2DTranspose,
        (3, 3, 2, 2),
        {"filters": 3, "kernel_size": 3, "strides": 2, "output_padding": 1},
        {"bias_prior": "normal", **FLIPOUT},
    ),
    case("depthwise_conv_2d", kv.VariationalDepthwiseConv2D, (3, 5, 4, 3), dict(kernel_size=3, depth_multiplier=2)),
    case("separable_conv_2d", kv.VariationalSeparableConv2D, (3, 5, 5, 3), dict(filters=4, kernel_size=3, strides=2)),
    case("embedding", kv.VariationalEmbedding, (4, 6), {"input_dim": 9, "output_dim": 3}, vocabulary=9),
    case(
        "embedding_mask",
        kv.VariationalEmbedding,
        (4, 6),
        {"input_dim": 9, "output_dim": 3, "mask_zero": True},
        {"kernel_prior": kv.priors.ARD(group_axis=0), **ONE_DRAW},
        vocabulary=9,
    ),
    case("attention", kv.VariationalMultiHeadAttention, (3, 4, 6), dict(num_heads=2, key_dim=3, use_bias=False)),
    case(
        "attention_bias",
        kv.VariationalMultiHeadAttention,
        (3, 4, 6),
        {"num_heads": 2, "key_dim": 3, "output_shape": 5},
        {"bias_prior": "normal", **FLIPOUT},
    ),
    case("lstm_cell", kv.VariationalLSTMCell, (3, 4, 5), {"units": 3}),
    case("lstm", kv.VariationalLSTM, (3, 4, 5), dict(units=3, return_sequences=True), {"bias_prior": "normal"}),
    case(
        "lstm_unrolled",
        kv.VariationalLSTM,
        (3, 4, 5),
        {"units": 3, "unroll": True, "go_backwards": True, "use_bias": False},
        {"kernel_prior": "ard", **FLIPOUT},
    ),
    case("gru_cell", kv.VariationalGRUCell, (3, 4, 5), {"units": 3, "reset_after": False}, {"bias_prior": "ard"}),
    case(
        "gru",
        kv.VariationalGRU,
        (3, 4, 5),
        {"units": 3, "return_sequences": True},
        {"bias_prior": "normal", "tied_masks": False, **FLIPOUT},
    ),
    case("simple_rnn_cell", kv.VariationalSimpleRNNCell, (3, 4, 5), {"units": 3}, FLIPOUT),
    case(
        "simple_rnn",
        kv.VariationalSimpleRNN,
        (3, 4, 5),
        {"units": 3, "activation": "relu"},
        {"kernel_prior": kv.priors.ARD(group_axis=-1)},
    ),
    Case("gaussian_dropout", *GAUSSIAN, (4, 3, 5), {}, {"rate": 0.3}),
    Case("gaussian_dropout_layer", *GAUSSIAN, (4, 5, 3), {}, {"alpha": "layer", "axis": 1, "prior": "ard"}),
    Case("gaussian_dropout_fixed", *GAUSSIAN, (4, 5), {}, {"alpha": "fixed"}, has_kl=False),
    case("concrete_dropout", CONCRETE, (4, 5), {"units": 3}, {"initial_rate": 0.3}, twin=layers.Dense),
    case(
        "concrete_dropout_spatial",
        CONCRETE,
        (3, 5, 4, 3),
        {"filters": 4, "kernel_size": 2},
        {"spatial": True, "prior_scale": 2.0},
        twin=layers.Conv2D,
    ),
    case(
        "variational_dense",
        kv.Variational,
        (4, 5),
        {"units": 3, "activation": "tanh"},
        {"include": "kernel|bias"},
        twin=layers.Dense,
    ),
    case(
        "variational_lstm",
        kv.Variational,
        (3, 4, 5),
        # Keras's default recurrent initializer fails in half precision on JAX.
        {"units": 3, "return_sequences": True, "recurrent_initializer": "glorot_uniform"},
        twin=layers.LSTM,
    ),
    case("variational_block", kv.Variational, (3, 4, 6), {"units": 3}, {"prior": "ard"}, twin=block),
    case("monte_carlo_dropout", kv.MonteCarloDropout, (4, 3, 5), {"rate": 0.4}, has_kl=False),
    case(
        "monte_carlo_dropout_shared",
        kv.MonteCarloDropout,
        (4, 3, 40),
        {"rate": 0.4, "noise_shape": (None, 1, None)},
        {"per_example": False},
        has_kl=False,
    ),
]


def posteriors(layer_or_model):
    """Return the posteriors that are variational weights."""
    return [posterior for posterior in all_posteriors(layer_or_model) if isinstance(posterior, VariationalWeight)]


def rates(layer_or_model):
    """Return the posteriors that are not variational weights: those of dropout rates."""
    return [posterior for posterior in all_posteriors(layer_or_model) if not isinstance(posterior, VariationalWeight)]


def randomize(layer_or_model, log_variance=(-4.0, 1.0)):
    """Set standard normal means and uniform log variances, so that every term matters."""
    rng = np.random.default_rng(0)
    for weight in posteriors(layer_or_model):
        if weight.loc.trainable:
            weight.loc.assign(rng.normal(size=weight.shape))
        weight.log_variance.assign(rng.uniform(*log_variance, size=weight.log_variance.shape))
    for posterior in rates(layer_or_model):
        posterior.kernel.assign(rng.normal(size=posterior.kernel.shape))


def array(tensor):
    """Convert any tensor or variable to a float32 NumPy array."""
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32")))


def scale_of(raw_scale):
    """Return softplus(raw_scale) + 1e-3, the scale that a raw scale encodes, in NumPy."""
    return np.log1p(np.exp(np.asarray(raw_scale, "float64"))) + 1e-3


def stock(model):
    """Return whether a model has only Keras's own layers, at every depth."""
    return not any(type(layer).__module__.startswith("keras_vdrop") for layer in model._flatten_layers())
