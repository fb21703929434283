"""Checks of arguments: they raise a `ValueError` that names the argument and the value."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras

# Within these bounds the KL to every prior is finite in float32, even summed over many weights.
_LEAST_LOG_VARIANCE, _LARGEST_LOG_VARIANCE = -80, 40


def is_int(value: Any) -> bool:
    """Return whether a value is an int, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_positive_int(name: str, value: Any) -> None:
    """Raise a `ValueError` unless `value` is an int > 0."""
    if not is_int(value) or value <= 0:
        raise ValueError(f"`{name}` must be a positive int. Received: {name}={value!r}")


def check_finite(name: str, value: Any) -> None:
    """Raise a `ValueError` unless `value` is a finite number."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number. Received: {name}={value!r}")


def check_non_negative(name: str, value: Any) -> None:
    """Raise a `ValueError` unless `value` is a finite number ≥ 0."""
    check_finite(name, value)
    if value < 0:
        raise ValueError(f"`{name}` must be ≥ 0. Received: {name}={value!r}")


def check_positive(name: str, value: Any) -> None:
    """Raise a `ValueError` unless `value` is a finite number > 0."""
    check_finite(name, value)
    if value <= 0:
        raise ValueError(f"`{name}` must be > 0. Received: {name}={value!r}")


def check_rate(name: str, value: Any) -> None:
    """Raise a `ValueError` unless `value` is a probability in [0, 1)."""
    check_finite(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"`{name}` must be a rate in [0, 1). Received: {name}={value!r}")


def check_fraction(name: str, value: float) -> None:
    """Raise a `ValueError` unless `value` lies in (0, 1)."""
    if not 0.0 < value < 1.0:
        raise ValueError(f"`{name}` must be between 0 and 1, for example 0.9. Received: {name}={value}")


def check_seed(seed: Any) -> None:
    """Raise a `ValueError` unless `seed` is an int or None."""
    if seed is not None and not is_int(seed):
        raise ValueError(f"`seed` must be an int or None. Received: seed={seed!r}")


def check_log_variance(name: str, value: Any) -> None:
    """Raise a `ValueError` unless `value` is a log variance for which the KL is finite in float32."""
    check_finite(name, value)
    if not _LEAST_LOG_VARIANCE <= value <= _LARGEST_LOG_VARIANCE:
        raise ValueError(
            f"`{name}` must be between {_LEAST_LOG_VARIANCE} and {_LARGEST_LOG_VARIANCE}. It is a log variance, "
            f"usually from −10 to 0. Received: {name}={value!r}"
        )


def require_built(model: keras.Model | keras.layers.Layer) -> None:
    """Raise a `ValueError` unless a model has been built."""
    if not model.built:
        raise ValueError(f"The model {model.name!r} has not been built: call it on some data first.")


def check_policy(policy: Any) -> None:
    """Raise a `ValueError` if a dtype policy quantizes weights."""
    if getattr(policy, "quantization_mode", None) is not None:
        raise ValueError(
            'A distribution over weights cannot be quantized. Train with a floating-point policy, such as "float32" or '
            '"mixed_float16". Then quantize the model that `keras_vdrop.to_deterministic` returns. '
            f"Received: dtype={policy.name!r}"
        )
