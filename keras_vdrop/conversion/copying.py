"""What a copy of a model is given of it: weights, states, what is frozen, and what it was compiled with."""

import math

import keras
import numpy as np
from keras import ops

from keras_vdrop.conversion.graphs import children, is_graph
from keras_vdrop.layers import Variational, VariationalGaussianDropout
from keras_vdrop.layers.base import StochasticLayer, is_unset
from keras_vdrop.posterior import VariationalWeight, posteriors


def stock_weights(layer):
    """The weights of a model or layer that Keras's own layers have too: of a posterior its mean, of noise nothing."""
    ours_alone = set()
    for posterior in posteriors(layer):
        owner = posterior.owner
        ours_alone.update(map(id, (owner.kl_weight, owner.free_bits, *posterior.variables)))
        if isinstance(posterior, VariationalWeight) and not isinstance(owner, VariationalGaussianDropout):
            ours_alone.discard(id(posterior.loc))
    return [variable for variable in layer.weights if id(variable) not in ours_alone]


def array(variable):
    """The values of a variable or tensor: a copy, because JAX gives away what a variable holds."""
    return np.array(ops.convert_to_numpy(variable))


def carry_over(model, twin, made, value=None):
    """Give a twin, in which some layers are of other classes, the weights of the model, its states and what is frozen.

    Args:
        model: The model.
        twin: The twin.
        made: Dict from ids of layers of the model to those of the twin, as `graph_copy` returns it.
        value: Function from a `VariationalWeight` of the model to what its place is given where it has none.

    Returns:
        List of the posteriors that the model does not have.

    Raises:
        ValueError: Where the twin has other weights.
    """
    means = {id(each.loc): each for each in posteriors(model) if isinstance(each, VariationalWeight)}
    pairs = list(_pairs(model, twin, made))
    for old, new in pairs:
        new.trainable = old.trainable  # and so is all within it, until its own turn
    fresh = []
    for old, new in pairs:
        if _is_alike(old, new):
            _assign(old, _own_variables(old), _own_variables(new), array)
            _keep_kl_weight(old, new)
            continue
        fresh += posteriors(new)
        if not _is_wrapped(old, new):  # whose layer is in another pair
            of = lambda each: array(value(means[id(each)]) if value and id(each) in means else each)  # noqa: E731
            _assign(old, stock_weights(old), stock_weights(new), of)
            _assign(old, _recurrent_states(old), _recurrent_states(new), array)
    _check_shared(model, twin)
    for posterior in fresh:
        if isinstance(posterior, VariationalWeight) and not posterior.loc.trainable:
            posterior.log_variance.trainable = False
    return fresh


def _pairs(old, new, made):
    """Every layer of a model with that of its twin, after those that it is in; within layers of one class alone."""
    yield old, new
    within = []
    if _is_wrapped(old, new):
        within = [(old, new.layer)]
    elif is_graph(old) and made.get(id(old)) is new:
        # A class of its own may hold its layers in another order than the graph.
        within = [(each, made[id(each)]) for each in children(old) if id(each) in made]
    elif _is_alike(old, new):
        inside = children(old), children(new)
        if len(inside[0]) != len(inside[1]):
            raise ValueError(f"{old.name!r}, a {type(old).__name__}, has other layers when it is made again.")
        within = [(one, made.get(id(one), other)) for one, other in zip(*inside)]
    for pair in within:
        yield from _pairs(*pair, made)


def _is_alike(old, new):
    """Whether the twin of a layer has the same parts."""
    return type(new) is type(old) or (is_graph(old) and is_graph(new))


def _is_wrapped(old, new):
    return isinstance(new, Variational) and not isinstance(old, Variational)


def _own_variables(layer):
    """The variables of a layer that are not of the layers within it; the states of generators among them."""
    within = {id(variable) for each in children(layer) for variable in each.variables}
    return [variable for variable in layer.variables if id(variable) not in within]


def _recurrent_states(layer):
    """What a recurrent layer keeps from one batch to the next."""
    kept = isinstance(layer, keras.layers.RNN) and layer.stateful and layer.states is not None
    return keras.tree.flatten(layer.states) if kept else []


def _assign(layer, sources, targets, value):
    """Give variables the values of others, and freeze those whose others are frozen."""
    shapes, expected = ([tuple(each.shape) for each in variables] for variables in (targets, sources))
    if shapes != expected:
        raise ValueError(
            f"{layer.name!r}, a {type(layer).__name__}, has other weights when it is made again from its config: "
            f"expected the shapes {expected}. Received: {shapes}"
        )
    for source, target in zip(sources, targets):
        target.assign(value(source))
        target.trainable = source.trainable


def _check_shared(model, twin):
    """Raise a `ValueError` where the twin has two of what is one in the model."""
    sizes = [sum(math.prod(each.shape) for each in stock_weights(each_model)) for each_model in (model, twin)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"In {model.name!r}, a layer within a wrapper is used outside of it too, or in another one. Of these Keras "
            "makes separate layers when they are made again: put what is shared into a model, and wrap nothing of it."
        )


def _keep_kl_weight(old, new):
    """Let a layer know that its KL weight has been set, by a callback, if that is so."""
    if isinstance(old, StochasticLayer) and old._kl_weight is not None and not is_unset(old):
        new.kl_weight = float(array(old.kl_weight))


def compile_as(model, twin):
    """Compile a twin with what a model was compiled with: an optimizer of the same arguments, and copies of metrics.

    Returns:
        None, or the reason why it cannot be done.
    """
    if not model.compiled:
        return None
    given = getattr(getattr(model, "_compile_config", None), "config", None)
    if given is None:
        return f"{type(model).__name__} has a `compile` of its own"
    try:
        optimizer = _again(model.optimizer)
        metrics = {name: _copied_metrics(given[name]) for name in ("metrics", "weighted_metrics")}
    except Exception as error:  # of a class of the user's own, whose config may fail in any way
        return f"of its optimizer or metrics there is no copy ({type(error).__name__}: {error})"
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    twin.compile(**{**given, **metrics, "optimizer": optimizer, "auto_scale_loss": scaled})
    return None


def _again(thing):
    return None if thing is None else type(thing).from_config(thing.get_config())


def _copied_metrics(value):
    """What `compile` takes as metrics, with copies of those that have a state."""
    if isinstance(value, dict):
        return {name: _copied_metrics(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied_metrics(each) for each in value]
    return _again(value) if isinstance(value, keras.metrics.Metric) else value
