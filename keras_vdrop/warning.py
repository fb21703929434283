"""Warnings that name the user's line, however deep within Keras they arise."""

import sys
import types
import warnings

# A frame of these packages is never the user's.
_PLUMBING = {"keras_vdrop", "keras", "tensorflow", "jax", "torch", "optree", "contextlib", "functools", "threading"}


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line of code outside Keras, its backends and this package."""
    frame, level = sys._getframe(1), 2
    while frame is not None and _package(frame) in _PLUMBING:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=2 if frame is None else level)


def _package(frame: types.FrameType) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]
