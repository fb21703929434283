"""Convert Keras's own layers to variational layers: the same predictions at the posterior mean."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import keras

from keras_vdrop import priors
from keras_vdrop.checks import check_positive, check_positive_int, require_built
from keras_vdrop.conversion.copying import carry_over, compile_as, stock_weights
from keras_vdrop.conversion.graphs import finalize_normalizations, graph_copy, known_layers
from keras_vdrop.conversion.making import NOISE_KINDS, Arguments, counterpart, noise, remade, wrapped, wrapped_model
from keras_vdrop.conversion.survey import ADAPTED, COUNTERPART, NOISE, VARIATIONAL, Site, choose, kernels, survey
from keras_vdrop.functional import sparsity
from keras_vdrop.layers import VariationalGaussianDropout
from keras_vdrop.posterior import Posterior, posteriors


def to_variational(
    model: keras.Model,
    layers: Any = None,
    prior: Any = "normal",
    *,
    bias_prior: Any = None,
    estimator: Literal["auto", "local_reparameterization", "flipout", "reparameterization"] = "auto",
    kl_weight: float | None = None,
    initial_log_variance: float | None = None,
    relative_variance: float | None = None,
    log_variance_rate: float = 5.0,
    threshold: float | None = None,
    empirical_bayes: bool = True,
    rank: int | None = None,
    lora_alpha: float | None = None,
    dropout: Literal["monte_carlo", "variational"] | None = None,
    print_fn: Callable[[str], Any] = print,
) -> keras.Model:
    """Return the same model made of variational layers: w ~ N(loc, exp(log_variance)), loc the trained weights.

    At the posterior mean it predicts what `model` predicts. Dense, EinsumDense, Embedding, the convolutions, recurrent
    layers, their cells and MultiHeadAttention are replaced by their counterparts of this package, wherever they are: in
    models within the model, in `TimeDistributed`, `Bidirectional` and other wrappers, in `RNN` and `StackedRNNCells`.
    Any other layer with kernels is wrapped in a `Variational`, and so is a subclassed model as a whole. Names,
    `trainable` flags, dtype policies, regularizers, constraints and masks stay the same. The result is compiled as
    `model` is. `model` itself does not change. A report says what becomes of each layer.

    With `empirical_bayes`, the prior of a weight is centered on its trained value (MOPED): p(w) = N(trained, scale²).
    Such a prior keeps what the network has learned. It does not prune, because noise does not pull a weight towards 0.
    For a smaller network, use "ard" or "log_uniform".

    Args:
        model: A built `keras.Model`.
        layers: Which layers to convert: a layer class, such as `keras.layers.Dense` (a wrapper class selects what it
            wraps); a regular expression, searched in their paths, as in "encoder/.*dense"; a function from a layer to a
            bool; a list of those; or "last", the last layer with kernels on the path to each output. None for all.
        prior: The prior of kernels and tables: as `kernel_prior` of `VariationalDense`.
        bias_prior: The same for biases; None for plain biases. A `Variational` leaves biases plain.
        estimator: As in `VariationalDense`. Layers that do not have it, such as recurrent ones, use "auto".
        kl_weight: Float ≥ 0, 1 / (number of training examples); None if the `ELBO` callback sets it.
        initial_log_variance: Float, the initial log_variance; None for the default of `VariationalDense`, which follows
            from the trained weights.
        relative_variance: Float > 0, used in place of `initial_log_variance`: the variance of each weight starts at
            this factor times its square, as in MOPED (0.01 is a standard deviation of 10 %).
        log_variance_rate, threshold: As in `VariationalDense`.
        empirical_bayes: Whether to center a normal prior on the trained weights instead of 0.
        rank: Positive int. The kernels W stay fixed. A low-rank update, W + (lora_alpha / rank)·A·B, is learned and has
            a posterior, as with `lora_rank` of `VariationalDense`. Its prior is centered on 0. Layers that cannot have
            such an update are wrapped in a `Variational`, which can.
        lora_alpha: The factor of the update; None for `rank`.
        dropout: None leaves dropout layers as they are. "monte_carlo" replaces `Dropout` and `SpatialDropout` layers by
            `MonteCarloDropout`, and `GaussianDropout` by `VariationalGaussianDropout(alpha="fixed")`: the same noise,
            which can be sampled. "variational" replaces all of them by `VariationalGaussianDropout`, which learns its
            noise. Within a layer that is wrapped in a `Variational`, both keep `Dropout` and `SpatialDropout`, and make
            them active within `sampling()`.
        print_fn: Called with each line of the report.

    Returns:
        A model of the same kind; `model` itself if everything that could be converted is variational already.

    Raises:
        ValueError: For a value that is out of range; a model that has not been built, is quantized, or has nothing to
            convert; `layers` that fit no layer; or a layer that cannot be made again from its config.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="head")])
        >>> bayesian = kv.to_variational(model, kl_weight=1 / 1000)
        head: Dense -> VariationalDense
        prior: Normal, centered on the trained weights; it does not prune: "ard" and "log_uniform" do
        12 of 15 weights are distributions now
        >>> x = keras.ops.ones((2, 4))
        >>> bool(keras.ops.all(keras.ops.abs(bayesian(x) - model(x)) < 1e-6))
        True

    Reference:
        Specifying Weight Priors in Bayesian Deep Neural Networks with Empirical Bayes, Krishnan, Subedar, Tickoo, 2020,
        https://arxiv.org/abs/1906.05323
    """
    if initial_log_variance is not None and relative_variance is not None:
        raise ValueError(
            "Pass `initial_log_variance` or `relative_variance`, not both. Received: "
            f"initial_log_variance={initial_log_variance}, relative_variance={relative_variance}"
        )
    if relative_variance is not None:
        check_positive("relative_variance", relative_variance)
    if rank is not None:
        check_positive_int("rank", rank)
        empirical_bayes = False  # a new update has no trained value to center the prior on
    if dropout not in NOISE_KINDS:
        raise ValueError(f"`dropout` must be one of {NOISE_KINDS}. Received: dropout={dropout!r}")
    arguments = Arguments(
        kernel_prior=_prior("prior", prior, empirical_bayes),
        bias_prior=None if bias_prior is None else _prior("bias_prior", bias_prior, empirical_bayes),
        estimator=estimator,
        kl_weight=kl_weight,
        initial_log_variance=initial_log_variance,
        log_variance_rate=log_variance_rate,
        threshold=threshold,
        lora_rank=rank,
        lora_alpha=lora_alpha,
    )
    _check_model(model)
    changes, left_out = _changes(model, layers, arguments, dropout)
    new_layers = {id(each.site.layer): each.make for each in changes if each.make is not None}
    if not new_layers:
        return _as_it_is(model, changes, print_fn, f"layers={layers!r}, dropout={dropout!r}")
    twin, made = _twin(model, new_layers)
    new_posteriors = carry_over(model, twin, made)
    fresh: list[Any] = [each for each in new_posteriors if not isinstance(each.owner, VariationalGaussianDropout)]
    for weight in fresh:
        weight.restart(relative_variance)
    finalize_normalizations(twin)
    report = _report(model, twin, changes, left_out, compile_as(model, twin))
    if fresh:
        report += [_about(arguments.kernel_prior, empirical_bayes), _count(model, fresh, rank)]
    for line in report:
        print_fn(line)
    return twin


def _as_it_is(model: keras.Model, changes: list[_Change], print_fn: Callable[[str], Any], received: str) -> keras.Model:
    """Return the model unchanged if it is variational already; else raise a `ValueError` with the reasons."""
    reasons = [each.line for each in changes if each.site.kind != VARIATIONAL]
    if not posteriors(model):
        lines = "\n".join([f"{model.name!r} has nothing to convert. Received: {received}", *reasons])
        raise ValueError(lines)
    for line in (*reasons, f"{model.name!r} is already variational: it is returned unchanged"):
        print_fn(line)
    return model


def _prior(name: str, identifier: Any, empirical_bayes: bool) -> Any:
    """Return the prior; with `empirical_bayes`, a normal prior is centered on the trained weights."""
    prior = priors.get(identifier)
    if prior is None and name == "prior":
        raise ValueError("`prior` must not be None: a variational weight needs a prior. Received: prior=None")
    if empirical_bayes and isinstance(prior, priors.Normal):
        return type(prior).from_config({**prior.get_config(), "centered": True})
    return prior


def _check_model(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a keras.Model. Received: model={model!r}")
    require_built(model)
    for layer in model._flatten_layers():
        if getattr(layer.dtype_policy, "quantization_mode", None) is not None:
            raise ValueError(
                f"{layer.name!r}, a {type(layer).__name__}, is quantized. Convert the model before you quantize it. "
                "Then quantize the result of `keras_vdrop.to_deterministic`. "
                f"Received: dtype={layer.dtype_policy.name!r}"
            )


# What becomes of each layer


@dataclasses.dataclass(frozen=True)
class _Change:
    """What becomes of a layer.

    Attributes:
        site: The `Site` of the layer.
        line: Its line of the report.
        make: Function without arguments that makes the replacement; None if the layer stays.
    """

    site: Site
    line: str
    make: Callable[[], Any] | None = None


def _changes(
    model: keras.Model, wanted: Any, arguments: Arguments, dropout: Literal["monte_carlo", "variational"] | None
) -> tuple[list[_Change], int]:
    """Return the changes, and the number of layers with kernels that `wanted` leaves out."""
    sites = survey(model, lambda layer: _reason_against(layer, arguments) is None)
    chosen = set(map(id, choose(sites, wanted, model)))
    changes = []
    for site in sites:
        if site.kind == NOISE:
            changes += [] if dropout is None else [_change_of_noise(site, dropout, arguments)]
        elif id(site) in chosen:
            changes.append(_change(site, site.layer is model, arguments, dropout))
    return changes, sum(site.kind != NOISE for site in sites) - len(chosen)


def _change(
    site: Site, is_model: bool, arguments: Arguments, dropout: Literal["monte_carlo", "variational"] | None
) -> _Change:
    layer, cls = site.layer, type(site.layer).__name__
    if site.kind == VARIATIONAL:
        return _Change(site, f"{site.path}: {cls} stays: it is already variational")
    if site.kind == ADAPTED:
        return _Change(
            site,
            f"{site.path}: {cls} stays: it has a low-rank adaptation. To merge it, assign `layer.kernel` to the "
            "kernel of a layer without `lora_rank`",
        )
    _check_groups(site, arguments.kernel_prior)
    why_not = "keras_vdrop has no counterpart for it"
    if site.kind == COUNTERPART:
        why_not = _reason_against(layer, arguments)
        if why_not is None:
            new = counterpart(layer, arguments)
            notes = _notes(layer, arguments.estimator, new)
            line = f"{site.path}: {cls} -> {type(new).__name__}{notes}"
            return _Change(site, line, functools.partial(counterpart, layer, arguments))
    make = functools.partial(wrapped_model if is_model else wrapped, layer, arguments, dropout)
    return _Change(site, f"{site.path}: {cls} -> Variational({cls}), because {why_not}{_notes(layer)}", make)


def _reason_against(layer: Any, arguments: Arguments) -> str | None:
    """Return why the layer's counterpart cannot replace it, or None if it can."""
    try:
        counterpart(layer, arguments)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _check_groups(site: Site, prior: priors.Prior) -> None:
    for kernel in kernels(site.layer):
        try:
            sparsity.check_groups(tuple(kernel.shape), **prior.groups)
        except ValueError as error:
            raise ValueError(f"The prior {prior} does not fit {site}: {error}") from error


def _notes(layer: Any, estimator: str | None = None, new: Any = None) -> str:
    notes = ""
    own = getattr(getattr(new, "cell", new), "estimator", estimator)
    if own != estimator:
        notes += f"; it does not support estimator={estimator!r} and uses {own!r}"
    if not any(kernel.trainable for kernel in kernels(layer)):
        notes += "; frozen: its variances are trained only after it is made trainable"
    return notes


def _change_of_noise(site: Site, dropout: Literal["monte_carlo", "variational"], arguments: Arguments) -> _Change:
    cls = type(site.layer).__name__
    make = functools.partial(noise, site.layer, dropout, arguments.kl_weight)
    try:
        return _Change(site, f"{site.path}: {cls} -> {type(make()).__name__}", make)
    except ValueError as error:
        return _Change(site, f"{site.path}: {cls} stays: {error}")


def _twin(model: keras.Model, new_layers: Mapping[int, Callable[[], Any]]) -> tuple[Any, dict[int, Any]]:
    """Return a copy with the new layers, freshly initialized, and a dict from the ids of old layers to new ones."""
    if id(model) in new_layers:
        with known_layers(model):
            return new_layers[id(model)](), {}
    return graph_copy(model, lambda layer: remade(layer, new_layers))


def _trains_by_own_code(model: keras.Model) -> bool:
    names = "fit", "train_step", "test_step", "compute_loss"
    return any(getattr(type(model), name) is not getattr(keras.Model, name) for name in names)


# The report


def _report(
    model: keras.Model, twin: keras.Model, changes: list[_Change], left_out: int, not_compiled: str | None
) -> list[str]:
    """Return the lines about the layers and the training of the twin.

    Args:
        model, twin: The model, and the result.
        changes: List of `_Change`.
        left_out: The number of layers with kernels that were not chosen.
        not_compiled: The reason why the twin is not compiled; None if it is, or if the model is not.
    """
    lines = [change.line for change in changes]
    if left_out:
        lines.append(
            f"{left_out} of the layers with kernels {'stay' if left_out > 1 else 'stays'}: not selected by `layers`"
        )
    if type(twin) is not type(model) and _trains_by_own_code(model):
        lines.append(
            f"{type(model).__name__} defines its own training steps or losses: the result does not have them, and "
            f"trains like any {type(twin).__name__}"
        )
    if not_compiled:
        lines.append(f"not compiled: {not_compiled}")
    return lines


def _count(model: keras.Model, posteriors: Iterable[Posterior], rank: int | None) -> str:
    drawn = sum(posterior.size for posterior in posteriors)
    total = sum(math.prod(variable.shape) for variable in stock_weights(model))
    of = f"of {total:,} weights" if rank is None else f"numbers, in updates of rank {rank},"
    return f"{drawn:,} {of} are distributions now"


def _about(prior: priors.Prior, empirical_bayes: bool) -> str:
    """Return the line of the report about the prior."""
    name = type(prior).__name__
    prunes = isinstance(prior, priors.ARD) or (isinstance(prior, priors.LogUniform) and prior.form != "cubic")
    if prunes:
        return f"prior: {name}; it prunes, so it is centered on 0, not on the trained weights"
    if getattr(prior, "centered", False):
        return f'prior: {name}, centered on the trained weights; it does not prune: "ard" and "log_uniform" do'
    unable = ", because it cannot be centered on the trained weights" if empirical_bayes else ""
    return f'prior: {name}, centered on 0{unable}; the priors that prune are "ard" and "log_uniform"'
