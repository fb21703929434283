"""Arguments that other libraries have, and what to write instead."""

import inspect
from collections.abc import Iterable, Mapping

_INITIAL = "Set the initial variance with `initial_log_variance`. The means start from the layer's initializers."
_PRIOR = "Pass `kernel_prior`: a name, a `keras_vdrop.priors.Prior` or, on TensorFlow, a distribution of TFP."
_BIAS_PRIOR = "Pass `bias_prior`, which takes what `kernel_prior` takes. By default the bias has no posterior."
_KL = "Pass `kl_weight=1 / num_examples`, or the callback `keras_vdrop.ELBO(num_examples=...)` to `fit`."
_POSTERIOR = "Every posterior consists of independent normals. " + _INITIAL
_NOISE = (
    "The layer learns the noise of its weights. For noise on its inputs, put `keras_vdrop.VariationalGaussianDropout` "
    "or `MonteCarloDropout` in front of it."
)
_OF_RECURRENT = "Pass `dropout` for the inputs, and `recurrent_dropout` for the state."
_SHAPE = "Leave it out: as in Keras, the layer finds the shape of its inputs by itself."

ANSWERS = {
    # tfp.layers
    **dict.fromkeys(["kernel_posterior_fn", "kernel_posterior_tensor_fn", "make_posterior_fn"], _POSTERIOR),
    **dict.fromkeys(["kernel_prior_fn", "make_prior_fn"], _PRIOR),
    **dict.fromkeys(["bias_posterior_fn", "bias_posterior_tensor_fn", "bias_prior_fn"], _BIAS_PRIOR),
    **dict.fromkeys(["kernel_divergence_fn", "bias_divergence_fn"], _KL + " The KL itself is in closed form."),
    "kl_use_exact": "Leave it out: the KL is in closed form wherever the prior allows it.",
    # bayesian-torch, blitz
    **dict.fromkeys(
        ["prior_mean", "prior_variance", "prior_mu", "prior_sigma", "prior_sigma_1", "prior_sigma_2", "prior_pi"],
        _PRIOR,
    ),
    **dict.fromkeys(["posterior_mu_init", "posterior_rho_init", "log_sigma2"], _INITIAL),
    "return_kl": "Leave it out: a layer returns its outputs, and its KL is in `layer.losses`.",
    # torch.nn
    **dict.fromkeys(["in_features", "in_channels", "input_size"], _SHAPE),
    "num_embeddings": "Pass `input_dim`.",
    "embedding_dim": "Pass `output_dim`.",
    "padding_idx": "Pass `mask_zero=True`, and use 0 for padding.",
    "embed_dim": "Pass `key_dim`, the size of one head: the embedding's size divided by `num_heads`.",
    "nonlinearity": "Pass `activation`.",
    "dilation": "Pass `dilation_rate`.",
    "out_features": "Pass `units`.",
    "out_channels": "Pass `filters`.",
    "hidden_size": "Pass `units`.",
    "bias": "Pass `use_bias`.",
    "stride": "Pass `strides`.",
    "num_layers": "Stack layers, all but the last with `return_sequences=True`.",
    "bidirectional": "Wrap the layer in `keras.layers.Bidirectional`.",
    "batch_first": "Leave it out: the axes are always (batch, time, channel).",
    "proj_size": "Put a `keras_vdrop.VariationalDense` behind the layer.",
    "p": "Pass `rate`, the share that is dropped, to a dropout layer. " + _NOISE,
    # Dropout of Keras and of snippets for PyTorch
    **dict.fromkeys(["rate", "dropout", "dropout_rate"], _NOISE),
    "dropouti": "Pass `dropout`.",
    **dict.fromkeys(["dropoutw", "weight_drop", "wdrop"], "Pass `weight_dropout`."),
    "dropouto": "Pass `output_dropout`.",
    # Names of this package, in the wrong place
    "prior": _PRIOR,
    "posterior": _POSTERIOR,
    "kernel_prior": "Pass `prior`.",
    "num_examples": _KL,
    "temperature": "Pass `temperature` to the callback `keras_vdrop.ELBO`.",
    "beta": "Pass `temperature` to the callback `keras_vdrop.ELBO`.",
    "initial_rate": "Pass `initial_log_variance`: log α + log(loc²) for the noise-to-signal ratio α.",
}


def refuse_foreign_arguments(cls: type, names: Iterable[str]) -> None:
    """Raise a ValueError if the class lacks an argument that has an answer here.

    Args:
        cls: The class of a layer.
        names: Names of given arguments.
    """
    for name in names:
        if name in ANSWERS and not _takes(cls, name):
            answer = _OF_RECURRENT if name in ("rate", "p") and _takes(cls, "recurrent_dropout") else ANSWERS[name]
            raise ValueError(f"{cls.__name__} has no argument `{name}`. {answer}")


def _takes(cls: type, name: str) -> bool:
    return any(name in _parameters(base) for base in cls.__mro__)


def _parameters(cls: type) -> Mapping[str, inspect.Parameter]:
    signature = vars(cls).get("__signature__")  # composed by `DropIn`
    return (signature or inspect.signature(cls.__init__)).parameters
