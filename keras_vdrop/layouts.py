"""How the variables of a posterior are split over devices under `keras.distribution.ModelParallel` (JAX)."""

from collections.abc import Callable, Sequence
from typing import Any

import keras


class _Layouts:
    """A distribution that takes the layout of each variable from a function."""

    def __init__(self, distribution: keras.distribution.ModelParallel, layout: Callable[[Any, Any], Any]):
        self._distribution, self._layout = distribution, layout

    def __getattr__(self, name: str) -> Any:
        return getattr(self._distribution, name)

    def get_variable_layout(self, variable: Any) -> Any:
        return self._layout(self._distribution, variable)


def named_as_in_keras(add_weight: Callable[..., Any], suffix: str) -> Callable[..., Any]:
    """Return an `add_weight` for the mean of a posterior, which follows a layout map made for Keras's layers.

    A key that matches the variable's own path takes precedence over one that matches the path in Keras's layer.

    Args:
        add_weight: The method of a layer.
        suffix: The end of the variable's name that the name in Keras's layer does not have.
    """

    def layout(distribution, variable):
        layouts = getattr(distribution, "_layout_map", {})
        for path in (variable.path, variable.path.removesuffix(suffix)):
            found = layouts[path]
            if found is not None:
                return found
        return _replicated(distribution, variable.shape)

    return _asking(add_weight, layout)


def laid_out_like(add_weight: Callable[..., Any], reference: Any) -> Callable[..., Any]:
    """Return an `add_weight` whose variables are split like `reference` along each axis of the same size."""

    def layout(distribution, variable):
        axes = getattr(getattr(reference, "_layout", None), "axes", None)
        if axes is None or len(variable.shape) != len(reference.shape):
            return _replicated(distribution, variable.shape)
        sizes = zip(axes, variable.shape, reference.shape)
        return keras.distribution.TensorLayout(
            [axis if own == size else None for axis, own, size in sizes], distribution.device_mesh
        )

    return _asking(add_weight, layout)


def _asking(add_weight: Callable[..., Any], layout: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Return an `add_weight` that takes layouts from `layout` under `ModelParallel`."""

    def add(**arguments):
        distribution = keras.distribution.distribution()
        if not isinstance(distribution, keras.distribution.ModelParallel):
            return add_weight(**arguments)
        keras.distribution.set_distribution(_Layouts(distribution, layout))
        try:
            return add_weight(**arguments)
        finally:
            keras.distribution.set_distribution(distribution)

    return add


def _replicated(
    distribution: keras.distribution.ModelParallel, shape: Sequence[int]
) -> keras.distribution.TensorLayout:
    return keras.distribution.TensorLayout([None] * len(shape), distribution.device_mesh)
