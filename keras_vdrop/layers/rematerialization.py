"""Rematerialization: computing a layer again in the backward pass, with the noise of the forward pass."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

from keras_vdrop.sampling import FixedSeeds, advance, drawing, is_consistent, repeated


class Rematerialized(keras.layers.Layer):
    """Mixin for a layer with a generator of noise that may be called within `keras.RematScope`."""

    _replay: contextvars.ContextVar["_Replay | None"] = contextvars.ContextVar("replay", default=None)

    @property
    def _replayed(self) -> keras.random.SeedGenerator | None:
        """The generator whose state determines all noise of a call that can be recomputed, or None."""
        return self.seed_generator

    def rematerialized_call(self, layer_call: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """As in Keras (within `keras.RematScope`), but the recomputation draws the same noise as the first pass."""
        replay, scope = contextlib.nullcontext, (is_consistent(), repeated())
        if self._replayed is not None:
            # Keras passes `training` to the layers within this one in the first pass only, so decide here and now
            # whether the call draws.
            state = ops.convert_to_tensor(self._replayed.state)
            advance(self._replayed)
            replay = functools.partial(self._replaying, state, self._noisy(kwargs.get("training")), scope)

        @functools.wraps(layer_call)
        def call(*args):
            with replay():
                return layer_call(*args, **kwargs)

        # TensorFlow takes no keywords here, but Keras passes `training` as one.
        rematerialized = super().rematerialized_call(call, *args)
        return lambda *args, **_: rematerialized(*args)

    @contextlib.contextmanager
    def _replaying(self, state: Any, noisy: bool, scope: tuple[bool, frozenset[int]]) -> Iterator[None]:
        token = self._replay.set(_Replay(state, noisy))
        try:
            with drawing(*scope):  # as in the first pass; `noisy` decides whether to draw
                yield
        finally:
            self._replay.reset(token)


class _Replay(FixedSeeds):
    """The seeds of a computation that can be repeated, and whether it draws."""

    def __init__(self, state: Any, noisy: bool):
        super().__init__(state)
        self.noisy = noisy
