"""From Keras's own layers to variational ones: the same predictions, of a distribution whose mean they are."""

import dataclasses
import functools
import math
from collections.abc import Callable

import keras

from keras_vdrop import priors
from keras_vdrop.conversion.copying import carry_over, compile_as, stock_weights
from keras_vdrop.conversion.graphs import graph_copy, known_layers, take_over
from keras_vdrop.conversion.making import NOISE_KINDS, Arguments, counterpart, noise, remade, wrapped, wrapped_model
from keras_vdrop.conversion.survey import ADAPTED, COUNTERPART, NOISE, VARIATIONAL, Place, choose, kernels, survey
from keras_vdrop.functional import sparsity
from keras_vdrop.layers import VariationalGaussianDropout
from keras_vdrop.layers.base import check_positive, check_positive_int
from keras_vdrop.posterior import posteriors


def to_variational(
    model,
    layers=None,
    prior="normal",
    *,
    bias_prior=None,
    estimator="auto",
    kl_weight=None,
    initial_log_variance=None,
    relative_variance=None,
    log_variance_rate=5.0,
    threshold=None,
    empirical_bayes=True,
    rank=None,
    lora_alpha=None,
    dropout=None,
    print_fn=print,
):
    """The same model of variational layers, w ~ N(loc, exp(log_variance)) with the trained weights for `loc`.

    Its predictions are those of `model`, at the posterior mean. Dense, EinsumDense, Embedding, the convolutions,
    recurrent layers, their cells and MultiHeadAttention become the layers of ours that stand for them, wherever they
    are: in models within the model, `TimeDistributed`, `Bidirectional` and other wrappers, `RNN` and `StackedRNNCells`.
    Any other layer with kernels, and a subclassed model as a whole, becomes a `Variational`. Names, what is frozen,
    dtype policies, regularizers, constraints and masks stay, and the result is compiled with what `model` was compiled
    with. `model` is left as it is. What becomes of each layer is printed.

    With `empirical_bayes`, the prior of a weight is centered on its trained value (MOPED): p(w) = N(trained, scale²).
    It keeps what the network has learned, and it does not prune: noise does not draw a weight to 0. Where the aim is a
    smaller network, take "ard" or "log_uniform".

    Args:
        model: A built `keras.Model`.
        layers: Which layers: a layer class, such as `keras.layers.Dense` (of a wrapper's, what it wraps); a regular
            expression, searched in their paths, as in "encoder/.*dense"; a function from a layer to a bool; a list of
            those; or "last", the last with kernels on the way to each output. None for all.
        prior: The prior of kernels and tables: as `kernel_prior` of `VariationalDense`.
        bias_prior: The same for biases; None, plain ones. A `Variational` leaves biases plain.
        estimator: As in `VariationalDense`; "auto" in recurrent layers, if they do not have it.
        kl_weight: Float ≥ 0, 1 / (number of training examples); None where the `ELBO` callback sets it.
        initial_log_variance: Float, where log_variance starts; None as in `VariationalDense`, by the trained weights.
        relative_variance: Float > 0, in its place: each weight's variance starts at that many times its square, as in
            MOPED (0.01 is a standard deviation of 10 %).
        log_variance_rate, threshold: As in `VariationalDense`.
        empirical_bayes: Whether a normal prior is centered on the trained weights; else it is on 0.
        rank: Positive int: the kernels stay as they are, and what is learned, and has a distribution, is an update of
            so low a rank, W + lora_alpha / rank·A·B, as `lora_rank` of `VariationalDense` has it. Its prior is about 0.
            Layers for which there is none stay.
        lora_alpha: The factor of the update; None for `rank`.
        dropout: None leaves dropout as it is. "monte_carlo" makes the layers `Dropout` and `SpatialDropout` into
            `MonteCarloDropout`, and `GaussianDropout` into `VariationalGaussianDropout(alpha="fixed")`: the same noise,
            that can be sampled. "variational" makes all of them into `VariationalGaussianDropout`, which learns.
        print_fn: Called with each line of the report.

    Returns:
        A model of the same kind; `model` itself, if there is nothing in it that is not variational already.

    Raises:
        ValueError: For a value that is out of range; a model that has not been built, is quantized, or has nothing to
            convert; `layers` that fit none; or a layer that cannot be made again from its config.

    Example:
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
            "A variance starts at `initial_log_variance` or at `relative_variance`, not at both. Received: "
            f"initial_log_variance={initial_log_variance}, relative_variance={relative_variance}"
        )
    if relative_variance is not None:
        check_positive("relative_variance", relative_variance)
    if rank is not None:
        check_positive_int("rank", rank)
        empirical_bayes = False  # an update has not been learned yet
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
    new_layers = {id(each.place.layer): each.make for each in changes if each.make is not None}
    if not new_layers:
        return _as_it_is(model, changes, print_fn, f"layers={layers!r}, dropout={dropout!r}")
    twin, made = _twin(model, new_layers)
    new_posteriors = carry_over(model, twin, made)
    fresh = [each for each in new_posteriors if not isinstance(each.owner, VariationalGaussianDropout)]
    for weight in fresh:
        weight.restart(relative_variance)
    take_over(twin)
    not_compiled = compile_as(model, twin)

    for change in changes:
        print_fn(change.line)
    if left_out:
        print_fn(f"{left_out} of the layers with kernels {'stay' if left_out > 1 else 'stays'}: not in `layers`")
    if type(twin) is not type(model) and _trains_by_own_code(model):
        print_fn(f"it trains like any {type(twin).__name__}: {type(model).__name__} has steps or losses of its own")
    if not_compiled:
        print_fn(f"not compiled: {not_compiled}")
    if fresh:
        print_fn(_about(arguments.kernel_prior, empirical_bayes))
        print_fn(_count(model, fresh, rank))
    return twin


def _as_it_is(model, changes, print_fn, received):
    """The model of which no layer is another, where that is no wonder."""
    reasons = [each.line for each in changes if each.place.kind != VARIATIONAL]
    if not posteriors(model):
        lines = "\n".join([f"{model.name!r} has nothing to convert. Received: {received}", *reasons])
        raise ValueError(lines)
    for line in (*reasons, f"{model.name!r} is variational already: it is returned as it is"):
        print_fn(line)
    return model


def _prior(name, identifier, empirical_bayes):
    """The prior; a normal one centered on the weights that there are, if it is to be."""
    prior = priors.get(identifier)
    if prior is None and name == "prior":
        raise ValueError("`prior` is needed: without it, weights are plain. Received: prior=None")
    if empirical_bayes and isinstance(prior, priors.Normal):
        return type(prior).from_config({**prior.get_config(), "centered": True})
    return prior


def _check_model(model):
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a keras.Model. Received: model={model!r}")
    if not model.built:
        raise ValueError(f"The model {model.name!r} has not been built: call it on some data first.")
    for layer in model._flatten_layers():
        if getattr(layer.dtype_policy, "quantization_mode", None) is not None:
            raise ValueError(
                f"{layer.name!r}, a {type(layer).__name__}, is quantized. Convert the model as it was before that, and "
                f"quantize what `keras_vdrop.to_deterministic` gives. Received: dtype={layer.dtype_policy.name!r}"
            )


# What becomes of each layer


@dataclasses.dataclass(frozen=True)
class _Change:
    """What becomes of a layer.

    Attributes:
        place: Where it is.
        line: What the report says of it.
        make: A function without arguments that makes what takes its place; None where it stays.
    """

    place: Place
    line: str
    make: Callable | None = None


def _changes(model, wanted, arguments, dropout):
    """The changes, and how many layers with kernels are not wanted."""
    places = survey(model)
    chosen = set(map(id, choose(places, wanted, model)))
    changes = []
    for place in places:
        if place.kind == NOISE:
            changes += [] if dropout is None else [_change_of_noise(place, dropout, arguments)]
        elif id(place) in chosen:
            changes.append(_change(place, place.layer is model, arguments))
    return changes, sum(place.kind != NOISE for place in places) - len(chosen)


def _change(place, is_model, arguments):
    layer, cls = place.layer, type(place.layer).__name__
    if place.kind == VARIATIONAL:
        return _Change(place, f"{place.path}: {cls} stays: it is variational already")
    if place.kind == ADAPTED:
        return _Change(
            place,
            f"{place.path}: {cls} stays: it has a low-rank adaptation. Merge it: give a layer without `lora_rank` the "
            "kernel that `layer.kernel` is",
        )
    _check_groups(place, arguments.kernel_prior)
    why_not = "there is no class of ours for it"
    if place.kind == COUNTERPART:
        try:
            new = counterpart(layer, arguments)
        except (TypeError, ValueError) as error:
            why_not = str(error)
        else:
            notes = _notes(layer, arguments.estimator, new)
            line = f"{place.path}: {cls} -> {type(new).__name__}{notes}"
            return _Change(place, line, functools.partial(counterpart, layer, arguments))
    make = functools.partial(wrapped_model if is_model else wrapped, layer, arguments)
    return _Change(place, f"{place.path}: {cls} -> Variational({cls}), as {why_not}{_notes(layer)}", make)


def _check_groups(place, prior):
    for kernel in kernels(place.layer):
        try:
            sparsity.check_groups(tuple(kernel.shape), **prior.groups)
        except ValueError as error:
            raise ValueError(f"The prior {prior} does not fit {place}: {error}") from error


def _notes(layer, estimator=None, new=None):
    notes = ""
    own = getattr(getattr(new, "cell", new), "estimator", estimator)
    if own != estimator:
        notes += f"; it has no estimator {estimator!r}: {own!r}"
    if not any(kernel.trainable for kernel in kernels(layer)):
        notes += "; frozen: its variances do not learn until it is trainable"
    return notes


def _change_of_noise(place, dropout, arguments):
    cls = type(place.layer).__name__
    make = functools.partial(noise, place.layer, dropout, arguments.kl_weight)
    try:
        return _Change(place, f"{place.path}: {cls} -> {type(make()).__name__}", make)
    except ValueError as error:
        return _Change(place, f"{place.path}: {cls} stays: {error}")


def _twin(model, new_layers):
    """The copy with new layers, of which the weights are those that layers start with; and what was made of which."""
    if id(model) in new_layers:
        with known_layers(model):
            return new_layers[id(model)](), {}
    return graph_copy(model, lambda layer: remade(layer, new_layers))


def _trains_by_own_code(model):
    names = "fit", "train_step", "test_step", "compute_loss"
    return any(getattr(type(model), name) is not getattr(keras.Model, name) for name in names)


# What is said


def _count(model, posteriors, rank):
    drawn = sum(posterior.size for posterior in posteriors)
    total = sum(math.prod(variable.shape) for variable in stock_weights(model))
    of = f"of {total:,} weights" if rank is None else f"numbers, in updates of rank {rank},"
    return f"{drawn:,} {of} are distributions now"


def _about(prior, empirical_bayes):
    """What the report says of the prior."""
    name = type(prior).__name__
    prunes = isinstance(prior, priors.ARD) or (isinstance(prior, priors.LogUniform) and prior.form != "cubic")
    if prunes:
        return f"prior: {name}; it prunes, and so it is about 0 and not about the trained weights"
    if getattr(prior, "centered", False):
        return f'prior: {name}, centered on the trained weights; it does not prune: "ard" and "log_uniform" do'
    unable = ", as it cannot be centered on the trained weights" if empirical_bayes else ""
    return f'prior: {name}, about 0{unable}; the priors that prune are "ard" and "log_uniform"'
