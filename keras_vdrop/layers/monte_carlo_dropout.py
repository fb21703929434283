"""`MonteCarloDropout`: dropout that prediction can draw, in place of Keras's or within any layer."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import layers, ops

from keras_vdrop.functional import noise
from keras_vdrop.functional.tensors import channel_axis
from keras_vdrop.layers.stochastic import StochasticLayer
from keras_vdrop.sampling import mask_shape

# Keras's layers of noise, which is active in training only.
KERAS_NOISE = (
    *(layers.Dropout, layers.SpatialDropout1D, layers.SpatialDropout2D, layers.SpatialDropout3D),
    *(layers.GaussianDropout, layers.GaussianNoise, layers.AlphaDropout),
)


@keras.saving.register_keras_serializable(package="keras_vdrop")
class MonteCarloDropout(StochasticLayer, keras.layers.Dropout):
    """y = x·z / (1 − rate), z ~ Bernoulli(1 − rate): `keras.layers.Dropout` that is also active under `sampling()`.

    In a model that `MonteCarlo` wraps, it drops inputs at prediction, as in MC dropout, while BatchNormalization and
    Keras's own Dropout stay in inference mode. Without noise y = x.

    Args:
        rate: Float in [0, 1], the probability that an input is dropped.
        noise_shape: As in `keras.layers.Dropout`: the shape of the mask, broadcast to the input; None along an axis
            stands for the input's size.
        seed: Int for the same noise in every run, or None.
        per_example: Whether every example has its own mask. If not, all examples of a call share one mask, so that a
            draw is one network. For one mask in a whole prediction use `MonteCarlo(consistent=True)`.
        **kwargs: `name`, `dtype`.

    Input shape:
        (B, ...).

    Output shape:
        That of the input.

    Raises:
        ValueError: For a value that is out of range.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> layer = kv.MonteCarloDropout(0.5, seed=0)
        >>> x = keras.ops.ones((2, 8))
        >>> bool(keras.ops.all(layer(x) == x))
        True
        >>> with kv.sampling():
        ...     bool(keras.ops.all(layer(x) == x))
        False

    Reference:
        Dropout as a Bayesian Approximation, Gal, Ghahramani, 2016, https://arxiv.org/abs/1506.02142
    """

    def __init__(
        self,
        rate: float,
        noise_shape: Sequence[int | None] | None = None,
        seed: int | None = None,
        per_example: bool = True,
        **kwargs: Any,
    ):
        if kwargs.pop("kl_weight", None) is not None:
            raise ValueError(
                "MonteCarloDropout has no argument `kl_weight`: its rate is fixed, so it has no KL. Leave it out. "
                "Use `keras_vdrop.ConcreteDropout` to learn a rate."
            )
        super().__init__(rate=rate, noise_shape=noise_shape, seed=seed, **kwargs)
        self.per_example = bool(per_example)

    @classmethod
    def like(cls, layer: Any) -> "MonteCarloDropout":
        """Return a `MonteCarloDropout` that drops as a `Dropout` or `SpatialDropout` layer does."""
        return cls(layer.rate, noise_shape_of(layer), layer.seed, name=layer.name, dtype=layer.dtype_policy)

    @property
    def draws(self) -> bool:
        return self.rate > 0.0

    def call(self, inputs: Any, training: bool | None = False) -> Any:
        if not self.draws or not self._noisy(training):
            return inputs
        shape = list(ops.shape(inputs))
        for axis, size in enumerate(self.noise_shape or ()):
            shape[axis] = shape[axis] if size is None else size
        if not self.per_example:
            shape[0] = 1
        keep = noise.bernoulli(mask_shape(shape), 1.0 - self.rate, self._seeds(), inputs.dtype)
        return inputs * (keep / (1.0 - self.rate)) if self.rate < 1.0 else ops.zeros_like(inputs)

    def get_config(self) -> dict[str, Any]:
        config = {**super().get_config(), "per_example": self.per_example}
        del config["kl_weight"]  # the layer has no KL
        return config


def noise_shape_of(layer: Any) -> tuple[int | None, ...] | None:
    """Return the mask shape of a dropout layer, in the format of `noise_shape` of `keras.layers.Dropout`."""
    ranks = {layers.SpatialDropout1D: 3, layers.SpatialDropout2D: 4, layers.SpatialDropout3D: 5}
    if type(layer) not in ranks:
        return layer.noise_shape
    shape = [None, *[1] * (ranks[type(layer)] - 1)]
    shape[channel_axis(layer)] = None
    return tuple(shape)


def take_over_dropout(layer: keras.layers.Layer) -> list[MonteCarloDropout]:
    """Make the dropout in a layer active under `sampling()` too, and return the layers that draw it.

    Each `Dropout` and `SpatialDropout` below the layer calls a `MonteCarloDropout` from then on. Its config does not
    change.
    """
    found = []
    for inner in layer._flatten_layers():
        if isinstance(inner, layers.Dropout) and not isinstance(inner, StochasticLayer) and not is_taken_over(inner):
            drawing = MonteCarloDropout.like(inner)
            drawing.build((None,))
            inner.call = drawing.__call__
            found.append(drawing)
    return found


def is_taken_over(layer: Any) -> bool:
    """Return whether a layer is dropout that `take_over_dropout` has made active under `sampling()`."""
    return isinstance(layer, layers.Dropout) and "call" in vars(layer)
