"""What a recurrent cell draws before the first time step and holds until the last: weights and masks."""

from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_vdrop.functional.tensors import is_float


class Product:
    """The function x ↦ x·W + b for the gates of a cell, side by side, with the same W, b and masks at every step.

    Args:
        units: The number of columns of a gate.
        matrix: W, (N, gates·units).
        bias: b, (gates·units,) or one row for each example, or None.
        flips: None, or the tuple (Δ, r, s) of flipout: Δ of shape (N, gates·units), the signs r of x and s of the
            output. The function is then x·W + ((x∘r)·Δ)∘s + b.
        masks: Sequence of the masks to multiply x by: one for all gates (None for no mask), or one for each gate.
    """

    def __init__(
        self,
        units: int,
        matrix: Any,
        bias: Any = None,
        flips: tuple[Any, Any, Any] | None = None,
        masks: Sequence[Any] = (None,),
    ):
        self.units = units
        self.gates: int = matrix.shape[-1] // units
        self.matrix = matrix
        self.bias = bias
        self.flips = flips
        self.masks = masks

    def __call__(self, x: Any, first: int = 0, last: int | None = None) -> Any:
        """Return the products of the gates `first` to `last` − 1 (all by default), side by side."""
        if not is_float(x):
            x = ops.cast(x, self.matrix.dtype)
        last = self.gates if last is None else last
        if len(self.masks) > 1:
            every = [self._cut_product(x * self.masks[gate], gate, gate + 1) for gate in range(first, last)]
            return ops.concatenate(every, axis=-1)
        (mask,) = self.masks
        return self._cut_product(x if mask is None else x * mask, first, last)

    def _cut_product(self, x: Any, first: int, last: int) -> Any:
        def cut(tensor):
            whole = (first, last) == (0, self.gates)
            return tensor if whole else tensor[..., first * self.units : last * self.units]

        y = ops.matmul(x, cut(self.matrix))
        if self.flips is not None:
            delta, of_input, of_output = self.flips
            y = y + ops.matmul(x * of_input, cut(delta)) * cut(of_output)
        return y if self.bias is None else y + cut(self.bias)


class Held:
    """The weights and masks that a cell has drawn for all steps of one sequence.

    Attributes:
        state: The state of the generator before the sequence, which determines all noise; None if the cell never draws.
        products: List of two pairs (without noise, with noise) of `Product`: for the inputs, and for the state.
        output_mask: The mask to multiply the output by, or None.
        used: Whether any step has used the noise.
    """

    def __init__(self, state: Any):
        self.state = state
        self.products: list[Any] = [None, None]
        self.output_mask: Any = None
        self.used = False
