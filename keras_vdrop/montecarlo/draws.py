"""The draws of `MonteCarlo`: seeds for the generators of a model, and the outputs of the model under them."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_vdrop import costs
from keras_vdrop.functional.tracing import side_by_side, traced_once
from keras_vdrop.sampling import OneDraw, drawing, generator_states, is_generator_state
from keras_vdrop.targets import mask_of


def draw_seeds(
    model: keras.Model, num_samples: int, together: int, generator: keras.random.SeedGenerator
) -> tuple[Any, Any]:
    """Draw one seed for each draw and each of the G generators of random numbers in a model.

    Args:
        model: The model.
        num_samples: Positive int, S.
        together: Positive int, k, the number of draws side by side.
        generator: A `keras.random.SeedGenerator`.

    Returns:
        The seeds of the first group of draws, (s, G), and those of n more groups of k draws each, (n, k, G), or None if
        n = 0. s is the remainder of S / k, or k where that is 0.
    """
    shape = num_samples, len(generator_states(model))
    seeds = keras.random.randint(shape, 0, 2**31 - 1, seed=generator)
    first = num_samples % together or min(together, num_samples)
    if first == num_samples:
        return seeds, None
    return seeds[:first], ops.reshape(seeds[first:], (-1, together, shape[1]))


def draws_of(
    model: keras.Model, inputs: Any, consistent: bool, in_order: Callable[[Any], list[Any]]
) -> Callable[[Any], tuple[Any, dict[int, Any]]]:
    """Return a function from seeds (s, G) to the outputs (s, B, ...) under s draws, computed side by side.

    The function also returns the masks (B, ...) of the outputs that have one, by the index of the output.

    Args:
        model: The model.
        inputs: Its inputs.
        consistent: Whether all rows share one draw.
        in_order: Function from the outputs to a flat list of them.
    """
    states = generator_states(model)
    # An example keeps its draw of a layer that it uses more than once. Only the code of a user's layer tells how often
    # it calls its sublayers, so these count as well. Layers with local reparameterization do not: they learned with
    # independent noise at each position, and draw like that here.
    repeated = [
        id(layer.seed_generator.state)
        for layer, _ in costs.used_repeatedly(model, calls_within=None)
        if layer.estimator != "local_reparameterization"
    ]
    held = [(v, ops.convert_to_tensor(v)) for v in model.variables if not is_generator_state(v)]

    def draw(seeds):
        """Return outputs and masks of a draw: each generator starts from its seed, and no other state changes."""
        started = [
            (state, ops.cast(ops.stack([seed, 0]), state.dtype)) for state, seed in zip(states, ops.unstack(seeds))
        ]
        with OneDraw(started + held, seeds[0]), drawing(consistent, repeated) as scope:
            outputs = model(inputs, training=False)
            masks = {index: mask_of(each) for index, each in enumerate(in_order(outputs))}
        if not scope.used:
            raise ValueError(
                f"Nothing was drawn from {model.name!r}: its layers are called by a function that was compiled before, "
                "such as a `call` under `tf.function`. Do not compile it: `MonteCarlo` does so."
            )
        return outputs, {index: mask for index, mask in masks.items() if mask is not None}

    def draws(seeds):
        outputs, masks = side_by_side(draw, seeds)
        return outputs, {index: mask[0] for index, mask in masks.items()}

    return traced_once(draws)
