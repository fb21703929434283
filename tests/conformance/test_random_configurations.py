"""Random arguments for every layer, from fixed seeds: the main properties of the cases hold for them too.

`pytest --configurations 500 tests/conformance/test_random_configurations.py` tries 500 for each layer, 10,000 in all.
"""

import json

import keras
import numpy as np
import pytest
from keras import layers

import keras_vdrop as kv
from tests.cases import array, case, posteriors, rates


class Draw:
    """Random choices from one seed."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def of(self, *options):
        return options[self.rng.integers(len(options))]

    def size(self, least=1, most=4):
        return int(self.rng.integers(least, most + 1))

    def yes(self):
        return bool(self.rng.integers(2))

    def rate(self):
        return float(self.rng.uniform(0.05, 0.6))

    def prior(self, axes=()):
        prior = self.of("log_uniform", "ard", "normal", "scale_mixture", "group", "learned", "exact")
        if prior == "group":
            return kv.priors.ARD(group_axis=self.of(*axes)) if axes else "ard"
        if prior == "learned":
            return kv.priors.Normal(0.4, trainable=True)
        return kv.priors.LogUniform(form="exact") if prior == "exact" else prior

    def ours(
        self, axes=(), bias=True, estimators=("auto", "local_reparameterization", "flipout", "reparameterization")
    ):
        """Return the variational arguments. A prior may group by one of `axes`."""
        return {
            "kernel_prior": self.prior(axes),
            "bias_prior": self.of(None, "ard", "normal", "log_uniform") if bias else None,
            "estimator": self.of(*estimators),
            "kl_weight": self.of(0.0, 0.01, 0.5),
            "initial_log_variance": self.of(None, -6.0, 1.0),
            "log_variance_rate": self.of(1.0, 5.0),
            "threshold": self.of(None, 0.0, 3.5),
            "seed": self.of(None, 3),
        }

    def activation(self):
        return self.of(None, "relu", "tanh", "softplus")

    def convolution(self, rank, transposed=False):
        """Return arguments of a convolution, the shape of a large enough input, and its number of channels."""
        kernel = self.size(1, 3)
        strides, dilation = self.of((1, 1), (2, 1), (1, 2))
        padding = self.of("valid", "same", *(["causal"] if rank == 1 and not transposed else []))
        # On a CPU, TensorFlow supports channels first only for some convolutions.
        first = not transposed and strides == dilation == 1 and padding != "causal" and self.yes()
        first = first and keras.backend.backend() != "tensorflow"
        channels = self.of(2, 4)
        spatial = [self.size(5, 7) for _ in range(rank)]
        arguments = {
            "kernel_size": kernel,
            "strides": strides,
            "padding": padding,
            "dilation_rate": dilation,
            "data_format": "channels_first" if first else "channels_last",
            "use_bias": self.yes(),
            "activation": self.activation(),
        }
        shape = (self.size(2, 3), channels, *spatial) if first else (self.size(2, 3), *spatial, channels)
        return arguments, shape, channels


def dense(draw):
    shape = tuple(draw.size(2, 4) for _ in range(draw.size(2, 4)))
    arguments = {"units": draw.size(), "use_bias": draw.yes(), "activation": draw.activation()}
    return case("dense", kv.VariationalDense, shape, arguments, draw.ours((0, 1, -1)))


def einsum_dense(draw):
    equation, output_shape, bias_axes = draw.of(
        ("ab,bc->ac", 3, draw.of(None, "c")),
        ("abc,cd->abd", (None, 2), draw.of(None, "d", "bd")),
        ("...x,xy->...y", 4, draw.of(None, "y")),
        ("abc,bcd->ad", 2, draw.of(None, "d")),
    )
    shape = (3, 4) if equation.startswith("ab,") else (3, 2, 4)
    if bias_axes == "bd":
        output_shape = (2, 2)
    arguments = {"equation": equation, "output_shape": output_shape, "bias_axes": bias_axes}
    arguments["activation"] = draw.activation()
    return case("einsum_dense", kv.VariationalEinsumDense, shape, arguments, draw.ours((0, -1)))


def convolution(rank, transposed):
    cls = getattr(kv, f"VariationalConv{rank}D{'Transpose' if transposed else ''}")

    def make(draw):
        arguments, shape, channels = draw.convolution(rank, transposed)
        arguments["filters"] = draw.of(2, 4)
        if transposed:
            arguments["output_padding"] = draw.of(None, 1) if arguments["strides"] == 2 else None
            if arguments["output_padding"] is not None:
                arguments["kernel_size"] = 3
        else:
            arguments["groups"] = draw.of(1, 2) if channels % 2 == 0 else 1
        return case("convolution", cls, shape, arguments, draw.ours((0, -1, -2)))

    return make


def depthwise(draw):
    arguments, shape, _ = draw.convolution(2)
    arguments["depth_multiplier"] = draw.size(1, 3)
    return case("depthwise", kv.VariationalDepthwiseConv2D, shape, arguments, draw.ours((0, -1, -2)))


def separable(draw):
    arguments, shape, _ = draw.convolution(2)
    arguments |= {"filters": draw.size(), "depth_multiplier": draw.size(1, 2)}
    return case("separable", kv.VariationalSeparableConv2D, shape, arguments, draw.ours((-1, -2)))


def embedding(draw):
    words = draw.size(3, 9)
    arguments = {"input_dim": words, "output_dim": draw.size(), "mask_zero": draw.yes()}
    shape = draw.of((4,), (3, 5), (2, 3, 2))
    ours = draw.ours((0, 1), bias=False)
    return case("embedding", kv.VariationalEmbedding, shape, arguments, ours, vocabulary=words)


def attention(draw):
    arguments = {
        "num_heads": draw.size(1, 3),
        "key_dim": draw.size(1, 4),
        "value_dim": draw.of(None, 2),
        "use_bias": draw.yes(),
        "dropout": draw.of(0.0, 0.3),
        "output_shape": draw.of(None, 5),
    }
    return case("attention", kv.VariationalMultiHeadAttention, (3, 4, 6), arguments, draw.ours((0, -1)))


def recurrent(kind, cell):
    cls = getattr(kv, f"Variational{kind}{'Cell' if cell else ''}")

    def make(draw):
        arguments = {
            "units": draw.size(),
            "activation": draw.of("tanh", "relu"),
            "use_bias": draw.yes(),
            "dropout": draw.of(0.0, 0.3),
            "recurrent_dropout": draw.of(0.0, 0.3),
        }
        if kind == "GRU":
            arguments["reset_after"] = draw.yes()
        if kind == "LSTM":
            arguments["unit_forget_bias"] = draw.yes()
        if not cell:
            arguments |= {"return_sequences": draw.yes(), "go_backwards": draw.yes(), "unroll": draw.yes()}
        ours = draw.ours((0, -1), estimators=("auto", "flipout", "reparameterization"))
        ours |= {"output_dropout": draw.of(0.0, 0.3), "weight_dropout": draw.of(0.0, 0.3), "tied_masks": draw.yes()}
        return case("recurrent" + "_cell" * cell, cls, (3, draw.size(2, 4), 5), arguments, ours)

    return make


def gaussian_dropout(draw):
    axis = draw.of(-1, 1)
    ours = {"rate": draw.rate(), "alpha": draw.of("unit", "layer", "fixed"), "axis": axis}
    ours |= {"prior": draw.of("log_uniform", "ard"), "kl_weight": draw.of(0.0, 0.1), "threshold": draw.of(0.5, 3.0)}
    found = case("gaussian_dropout", kv.VariationalGaussianDropout, (4, 3, 5), {}, ours, twin=layers.Identity)
    return found


def concrete_dropout(draw):
    ours = {"initial_rate": draw.rate(), "temperature": draw.of(0.1, 0.5), "prior_scale": draw.of(0.5, 2.0)}
    if draw.yes():
        arguments, shape, _ = draw.convolution(2)
        arguments["filters"] = draw.size()
        ours["spatial"] = draw.yes()
        return case("concrete_dropout", kv.ConcreteDropout, shape, arguments, ours, twin=layers.Conv2D)
    return case("concrete_dropout", kv.ConcreteDropout, (4, 5), {"units": draw.size()}, ours, twin=layers.Dense)


def any_layer(draw):
    """Return a case of `Variational` around a convolution or a GRU."""
    ours = {
        "include": draw.of(None, "kernel", ["kernel", "bias"]),
        "prior": draw.of("log_uniform", "ard", "normal"),
        "threshold": draw.of(None, 1.0),
        "seed": draw.of(None, 3),
    }
    if draw.yes():
        arguments, shape, _ = draw.convolution(2)
        arguments |= {"filters": draw.size(), "use_bias": True}
        return case("any_layer", kv.Variational, shape, arguments, ours, twin=layers.Conv2D)
    ours["exclude"] = draw.of(None, "recurrent")
    arguments = {"units": draw.size(), "return_sequences": draw.yes(), "reset_after": draw.yes()}
    arguments["recurrent_initializer"] = "glorot_uniform"
    return case("any_layer", kv.Variational, (3, draw.size(2, 4), 5), arguments, ours, twin=layers.GRU)


def monte_carlo_dropout(draw):
    arguments = {"rate": draw.rate(), "noise_shape": draw.of(None, (None, 1, None))}
    ours = {"per_example": draw.yes(), "seed": draw.of(None, 3)}
    return case("monte_carlo_dropout", kv.MonteCarloDropout, (4, 3, 5), arguments, ours, has_kl=False)


LAYERS = {
    "dense": dense,
    "einsum_dense": einsum_dense,
    **{f"conv_{rank}d": convolution(rank, False) for rank in (1, 2, 3)},
    **{f"conv_{rank}d_transpose": convolution(rank, True) for rank in (1, 2)},
    "depthwise_conv_2d": depthwise,
    "separable_conv_2d": separable,
    "embedding": embedding,
    "attention": attention,
    **{kind.lower(): recurrent(kind, False) for kind in ("LSTM", "GRU", "SimpleRNN")},
    **{f"{kind.lower()}_cell": recurrent(kind, True) for kind in ("LSTM", "GRU", "SimpleRNN")},
    "gaussian_dropout": gaussian_dropout,
    "concrete_dropout": concrete_dropout,
    "monte_carlo_dropout": monte_carlo_dropout,
    "any_layer": any_layer,
}
# No float16: it has no QR decomposition, which initializes recurrent layers, and no convolution on some processors.
POLICIES = ("float32", "mixed_bfloat16", "float64")


def test_every_public_layer_is_drawn():
    drawn = {LAYERS[name](Draw(0)).cls for name in LAYERS}
    public = {each for each in vars(kv).values() if isinstance(each, type) and issubclass(each, layers.Layer)}
    assert drawn == public - {kv.MonteCarlo}


@pytest.mark.filterwarnings("ignore:No weights are kept")
@pytest.mark.parametrize("name", LAYERS)
def test_random_configuration(name, index, tmp_path):
    draw = Draw([list(LAYERS).index(name), index])
    subject, policy = LAYERS[name](draw), draw.of(*POLICIES)
    print(subject.keras, subject.ours, policy)  # pytest shows it if the test fails
    x = subject.inputs()

    try:
        stock = subject.make_twin(dtype=policy)
        expected = subject.call(stock, x)
    except Exception as error:  # if Keras's layer fails, ours must raise the same type of error
        with pytest.raises(type(error)):
            subject.call(subject.make(dtype=policy), x)
        return

    layer = subject.make(dtype=policy)
    config = layer.get_config()
    assert type(layer).from_config(json.loads(json.dumps(config))).get_config() == config

    model = subject.model(layer)
    assert model.output_shape == subject.model(stock).output_shape
    for training in (False, True):
        output = subject.call(layer, x, training=training)
        assert (tuple(output.shape), output.dtype) == (tuple(expected.shape), expected.dtype)
        assert np.isfinite(array(output)).all()
    for posterior in [*posteriors(model), *rates(model)]:
        kl = float(array(posterior.kl()))
        # The KL of a scale mixture is estimated from draws, so it can be negative by chance.
        assert np.isfinite(kl) and (kl >= -1e-4 * posterior.size or "ScaleMixture" in str(posterior.prior))

    if any(weight.prunable for weight in posteriors(model)):
        report = kv.prune(model)
        assert 0 <= report.left <= report.weights
        assert kv.sparsity(model).left == report.left
    twin = kv.to_deterministic(model)
    tolerance = 1e-2 if "bfloat16" in policy else 1e-5
    np.testing.assert_allclose(array(twin(x)), array(model(x)), rtol=tolerance, atol=tolerance)

    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(array(keras.saving.load_model(tmp_path / "model.keras")(x)), array(model(x)))
    kv.compact(model, x=x)  # raises an error if the smaller model predicts something else
