"""Tensors that are computed from variables and behave like a variable."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import keras
import numpy as np
from keras import ops

_OPERATORS = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "pos", "abs", "getitem"),
    *("eq", "ne", "lt", "le", "gt", "ge"),
    *("radd", "rsub", "rmul", "rtruediv", "rfloordiv", "rmod", "rpow", "rmatmul"),
)


class VariableLike:
    """Mixin for objects with a `value`, a tensor computed from variables, which stand for it in operations and NumPy.

    In PyTorch, `keras.ops` convert such an object to a constant. Pass them its `value`, through which gradients flow.
    """

    @property
    def value(self) -> Any:
        """The tensor."""
        raise NotImplementedError

    def assign(self, value: Any) -> Any:
        """Set the value and return it."""
        raise NotImplementedError

    def assign_add(self, value: Any) -> Any:
        """Add to the value and return the sum."""
        return self.assign(self + value)

    def assign_sub(self, value: Any) -> Any:
        """Subtract from the value and return the difference."""
        return self.assign(self - value)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> str:
        return keras.backend.standardize_dtype(self.value.dtype)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    # `==` compares elementwise, so dicts and sets have to go by identity.
    __hash__ = object.__hash__

    def __bool__(self) -> NoReturn:
        raise TypeError(
            f"{self!r} has no truth value. Use `is None`, or apply `keras.ops.any` or `all` to a comparison."
        )

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array."""
        return np.asarray(ops.convert_to_numpy(self.value))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self.numpy()
        return values if dtype is None else values.astype(dtype)

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Any:
        return ops.convert_to_tensor(self.value, dtype)

    def __jax_array__(self) -> Any:
        return self.value

    if TYPE_CHECKING:  # the operators, which `_operate` makes

        def __add__(self, other: Any) -> Any: ...

        __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __pow__ = __matmul__ = __getitem__ = __add__
        __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rfloordiv__ = __rmod__ = __rpow__ = __rmatmul__ = __add__
        __lt__ = __le__ = __gt__ = __ge__ = __add__

        def __neg__(self) -> Any: ...

        __pos__ = __abs__ = __neg__

        def __eq__(self, other: Any) -> Any: ...

        __ne__ = __eq__


def _operate(name: str) -> Callable[..., Any]:
    special = f"__{name}__"

    def method(self, *others):
        others = [other.value if isinstance(other, VariableLike) else other for other in others]
        return getattr(ops.convert_to_tensor(self.value), special)(*others)

    method.__name__ = special
    return method


for _name in _OPERATORS:
    setattr(VariableLike, f"__{_name}__", _operate(_name))


class Scaled(VariableLike):
    """`factor` times a variable, which rescales the steps of an optimizer.

    An optimizer such as Adam moves every variable by about one learning rate a step, whatever the variable's units. It
    moves this value by about `factor` learning rates.

    Args:
        variable: The `keras.Variable` that is stored and trained.
        factor: Float > 0.
    """

    def __init__(self, variable: Any, factor: float):
        self.variable = variable
        self.factor = float(factor)

    @property
    def value(self) -> Any:
        return self.factor * ops.convert_to_tensor(self.variable)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.variable.shape

    @property
    def dtype(self) -> str:
        return self.variable.dtype

    def assign(self, value: Any) -> Any:
        value = ops.convert_to_tensor(value, self.dtype)
        self.variable.assign(ops.divide(value, self.factor))
        return value

    @property
    def trainable(self) -> bool:
        return self.variable.trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self.variable.trainable = value

    @property
    def path(self) -> str:
        return self.variable.path

    @property
    def name(self) -> str:
        return self.variable.name

    def __repr__(self) -> str:
        return f"<{self.factor:g} x {self.variable!r}>"


class LogScaleOf(keras.initializers.Initializer):
    """Initializer (power·log(rms) + offset) / unit, with the root mean square of a variable at the time of the call.

    Args:
        variable: The `keras.Variable`. It must exist before the variable that this initializes.
        power: Float, 1 for the logarithm of a scale and 2 for that of a variance.
        offset: Float.
        unit: Float > 0, the factor of the `Scaled` that the initialized variable belongs to.
        zeros: Float > 0, replaces the root mean square of a variable that is all 0, as biases are.
    """

    def __init__(self, variable: Any, power: float, offset: float, unit: float = 1.0, zeros: float = 0.1):
        self.variable = variable
        self.power = power
        self.offset = offset
        self.unit = unit
        self.zeros = zeros

    def __call__(self, shape: Sequence[int], dtype: Any = None) -> Any:
        values: Any = ops.convert_to_tensor(self.variable)
        values = ops.cast(values, dtype or values.dtype)
        rms = ops.sqrt(ops.mean(ops.square(values)))
        rms = ops.where(rms > 0.0, rms, self.zeros)
        start = (self.power * ops.log(rms) + self.offset) / self.unit
        return ops.ones(shape, values.dtype) * start
