"""Tensors that are made of variables, and answer like one."""

import keras
from keras import ops

_OPERATORS = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "pos", "abs", "getitem"),
    *("eq", "ne", "lt", "le", "gt", "ge"),
    *("radd", "rsub", "rmul", "rtruediv", "rfloordiv", "rmod", "rpow", "rmatmul"),
)


class VariableLike:
    """Mixin for what has a `value`, a tensor made of variables, and takes its place in operations and in NumPy.

    In PyTorch, `keras.ops` turn it into a constant: give them `value`, through which gradients flow.
    """

    @property
    def value(self):
        """The tensor."""
        raise NotImplementedError

    def assign(self, value):
        """Give it that value, and return it."""
        raise NotImplementedError

    def assign_add(self, value):
        """Add to its value, and return the sum."""
        return self.assign(self + value)

    def assign_sub(self, value):
        """Subtract from its value, and return the difference."""
        return self.assign(self - value)

    @property
    def shape(self):
        return tuple(self.value.shape)

    @property
    def dtype(self):
        return keras.backend.standardize_dtype(self.value.dtype)

    @property
    def ndim(self):
        return len(self.shape)

    # It compares number by number, and is in a dict or a set as itself.
    __hash__ = object.__hash__

    def __bool__(self):
        raise TypeError(f"{self!r} has no truth value: use `is None`, or `keras.ops.any` or `all` of a comparison.")

    def numpy(self):
        """The values as a NumPy array."""
        return ops.convert_to_numpy(self.value)

    def __array__(self, dtype=None, copy=None):
        values = self.numpy()
        return values if dtype is None else values.astype(dtype)

    def __tf_tensor__(self, dtype=None, name=None):
        return ops.convert_to_tensor(self.value, dtype)

    def __jax_array__(self):
        return self.value


def _operate(name):
    special = f"__{name}__"

    def method(self, *others):
        others = [other.value if isinstance(other, VariableLike) else other for other in others]
        return getattr(ops.convert_to_tensor(self.value), special)(*others)

    method.__name__ = special
    return method


for _name in _OPERATORS:
    setattr(VariableLike, f"__{_name}__", _operate(_name))


class Scaled(VariableLike):
    """`factor` times a variable: the same number in units in which an optimizer's step is of the right size.

    An optimizer such as Adam moves a variable by about a learning rate a step, whatever the variable means. It moves
    this one by `factor` learning rates.

    Args:
        variable: The `keras.Variable` that is stored and trained.
        factor: Float > 0.
    """

    def __init__(self, variable, factor):
        self.variable = variable
        self.factor = float(factor)

    @property
    def value(self):
        return self.factor * ops.convert_to_tensor(self.variable)

    @property
    def shape(self):
        return self.variable.shape

    @property
    def dtype(self):
        return self.variable.dtype

    def assign(self, value):
        value = ops.convert_to_tensor(value, self.dtype)
        self.variable.assign(ops.divide(value, self.factor))
        return value

    @property
    def trainable(self):
        return self.variable.trainable

    @trainable.setter
    def trainable(self, value):
        self.variable.trainable = value

    @property
    def path(self):
        return self.variable.path

    @property
    def name(self):
        return self.variable.name

    def __repr__(self):
        return f"<{self.factor:g} x {self.variable!r}>"


class LogScaleOf(keras.initializers.Initializer):
    """power·log(rms of a variable) + offset, with the root mean square of the values that the variable has by then.

    Args:
        variable: The `keras.Variable`, made before whatever this initializes.
        power: Float, 1 for the logarithm of a scale and 2 for that of a variance.
        offset: Float.
        unit: Float > 0, by which the result is divided: the factor of a `Scaled`.
        zeros: Float > 0, what takes the place of the root mean square of a variable that is 0, as biases are.
    """

    def __init__(self, variable, power, offset, unit=1.0, zeros=0.1):
        self.variable = variable
        self.power = power
        self.offset = offset
        self.unit = unit
        self.zeros = zeros

    def __call__(self, shape, dtype=None):
        values = ops.convert_to_tensor(self.variable)
        values = ops.cast(values, dtype or values.dtype)
        rms = ops.sqrt(ops.mean(ops.square(values)))
        rms = ops.where(rms > 0.0, rms, self.zeros)
        start = (self.power * ops.log(rms) + self.offset) / self.unit
        return ops.ones(shape, values.dtype) * start
