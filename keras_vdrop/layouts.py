"""Where the variables of a weight are, among several devices: `keras.distribution.ModelParallel` in JAX."""

import keras


class _Layouts:
    """A distribution that asks a function first for the layout of a variable."""

    def __init__(self, distribution, layout):
        self._distribution, self._layout = distribution, layout

    def __getattr__(self, name):
        return getattr(self._distribution, name)

    def get_variable_layout(self, variable):
        return self._layout(self._distribution, variable)


def named_as_in_keras(add_weight, suffix):
    """`add_weight` for the mean of a weight: a layout map made for Keras's layers finds it.

    A key that fits the variable's own path goes first.

    Args:
        add_weight: Of a layer.
        suffix: What the name of the variable has more than that of Keras's.
    """

    def layout(distribution, variable):
        layouts = getattr(distribution, "_layout_map", {})
        for path in (variable.path, variable.path.removesuffix(suffix)):
            found = layouts[path]
            if found is not None:
                return found
        return _replicated(distribution, variable.shape)

    return _asking(add_weight, layout)


def laid_out_like(add_weight, reference):
    """`add_weight` for what belongs to a variable: each axis of the same size is split as that one's is."""

    def layout(distribution, variable):
        axes = getattr(getattr(reference, "_layout", None), "axes", None)
        if axes is None or len(variable.shape) != len(reference.shape):
            return _replicated(distribution, variable.shape)
        sizes = zip(axes, variable.shape, reference.shape)
        return keras.distribution.TensorLayout(
            [axis if own == size else None for axis, own, size in sizes], distribution.device_mesh
        )

    return _asking(add_weight, layout)


def _asking(add_weight, layout):
    """`add_weight` under a distribution by models, with layouts of our own."""

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


def _replicated(distribution, shape):
    return keras.distribution.TensorLayout([None] * len(shape), distribution.device_mesh)
