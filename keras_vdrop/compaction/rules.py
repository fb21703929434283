"""How channels pass through layers, one `Rule` for each kind of layer."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import activations, layers, ops

from keras_vdrop.compaction.graph import Call, Key, Shape
from keras_vdrop.functional.tensors import to_numpy

# The changed arguments of a layer, or a new layer; and the weights to set.
Cut: TypeAlias = tuple[dict[str, Any] | keras.layers.Layer, list[np.ndarray]]


class Rule:
    """How channels pass through a layer. This base class is for an unknown layer, which needs all channels.

    In all methods, `known` is a list of one array for each input: the values of constant channels, and NaN for the
    others. `ins` and `outs` are lists of one boolean array for each input and output, True for a channel that is kept.

    Attributes:
        layer: The layer, one of Keras's own; or the operation, such as `x + y` and `keras.ops` make.
        shapes: List of the calls; of each, a list of the shapes of its inputs.
        masked: Whether a mask of positions may reach the layer.
        reads_channels: Whether the last axis of the inputs holds channels.
        has_sizes: Whether some arguments of the layer are sizes, even if it has no weights.
    """

    reads_channels = True
    has_sizes = False

    def __init__(self, layer: Any, shapes: Sequence[Sequence[Shape]] = (), masked: bool = True):
        self.layer = layer
        self.shapes = shapes
        self.masked = masked

    @classmethod
    def inputs(cls, call: Call) -> list[Key] | None:
        """Return the keys of the inputs of a call; None if the rule does not know this form of call."""
        return call.inputs if call.plain else None

    @classmethod
    def fits(cls, layer: Any, inputs: Sequence[Shape]) -> bool:
        """Return whether the rule holds for a layer of its kind on inputs of these shapes."""
        return True

    def constants(self, known: list[np.ndarray], sizes: Sequence[int]) -> list[np.ndarray]:
        """Return `known` of the outputs, which have these numbers of channels."""
        return [np.full(size, np.nan) for size in sizes]

    def need(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> None:
        """Set to True, in `ins` and `outs`, the channels that the layer needs."""
        for mask in (*ins, *outs):
            mask[:] = True

    def settle(self, outs: list[np.ndarray]) -> None:
        """Keep one channel of each output that needs none, since a size cannot be 0."""
        for mask in outs:
            mask[:1] |= not mask.any()

    def cut(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> Cut:
        """Return the changed arguments as a dict, or a new layer; and the list of weights to set."""
        return {}, self.layer.get_weights()


class PassThrough(Rule):
    """A layer that does not mix channels: output channel i depends only on input channel i."""

    @classmethod
    def fits(cls, layer: Any, inputs: Sequence[Shape]) -> bool:
        return one_input(layer, inputs) and is_elementwise(getattr(layer, "activation", None))

    def of_constants(self, value: np.ndarray) -> np.ndarray:
        """Return what the layer makes of constants; here, the same values."""
        return value

    def constants(self, known: list[np.ndarray], sizes: Sequence[int]) -> list[np.ndarray]:
        return [self.of_constants(known[0]) for _ in sizes]

    def need(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> None:
        tie(*ins, *outs)


class Elementwise(PassThrough):
    """A function that is applied to each number."""

    def of_constants(self, value: np.ndarray) -> np.ndarray:
        return np.where(np.isnan(value), np.nan, _apply(self.layer, value))


class Padding(PassThrough):
    """Padding with zeros: a constant channel stays constant only if it is 0."""

    def of_constants(self, value: np.ndarray) -> np.ndarray:
        return zeros_only(value)


class Scaling(PassThrough):
    """Rescaling: one scale and one offset for all channels, or one for each channel."""

    has_sizes = True

    def __init__(self, layer: Any, *place: Any):
        super().__init__(layer, *place)
        self.terms = {name: np.asarray(getattr(layer, name)) for name in ("scale", "offset")}

    @classmethod
    def fits(cls, layer: Any, inputs: Sequence[Shape]) -> bool:
        shapes = (np.shape(layer.scale), np.shape(layer.offset))
        return one_input(layer, inputs) and all(shape in [(), *_of_channels(inputs[0])] for shape in shapes)

    def of_constants(self, value: np.ndarray) -> np.ndarray:
        scale, offset = (np.ravel(term) for term in self.terms.values())
        return np.where(scale == 0.0, 0.0, scale * value) + offset

    def cut(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> Cut:
        return {name: (term[..., ins[0]] if term.ndim else term).tolist() for name, term in self.terms.items()}, []


class Normalization(PassThrough):
    """BatchNormalization: a scale and an offset for each channel."""

    @classmethod
    def fits(cls, layer: Any, inputs: Sequence[Shape]) -> bool:
        return super().fits(layer, inputs) and layer.axis in (-1, len(inputs[0]) - 1)

    def of_constants(self, value: np.ndarray) -> np.ndarray:
        def array(variable):
            return to_numpy(variable).astype("float64")

        layer = self.layer
        value = (value - array(layer.moving_mean)) / np.sqrt(array(layer.moving_variance) + layer.epsilon)
        if layer.scale:
            value = value * array(layer.gamma)
        return value + array(layer.beta) if layer.center else value

    def cut(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> Cut:
        return {}, [weight[ins[0]] for weight in self.layer.get_weights()]


class Merge(Rule):
    """An elementwise function of several tensors."""

    # By class name, which is the same for layers and operations.
    _OF = {  # noqa: RUF012
        "Add": lambda values: values.sum(axis=0),
        "Subtract": lambda values: values[0] - values[1],
        "Multiply": lambda values: values.prod(axis=0),
        "Average": lambda values: values.mean(axis=0),
        "Maximum": lambda values: values.max(axis=0),
        "Minimum": lambda values: values.min(axis=0),
    }

    @classmethod
    def fits(cls, layer: Any, inputs: Sequence[Shape]) -> bool:
        return len({(len(shape), shape[-1]) for shape in inputs}) == 1

    def constants(self, known: list[np.ndarray], sizes: Sequence[int]) -> list[np.ndarray]:
        name = type(self.layer).__name__
        value = self._OF[name](np.stack(known))
        if name == "Multiply":
            value = np.where((np.stack(known) == 0.0).any(axis=0), 0.0, value)
        return [value for _ in sizes]

    def need(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> None:
        tie(*ins, *outs)


class Concatenation(Rule):
    """Concatenation on the channel axis."""

    @classmethod
    def fits(cls, layer: Any, inputs: Sequence[Shape]) -> bool:
        return layer.axis in (-1, len(inputs[0]) - 1)

    def constants(self, known: list[np.ndarray], sizes: Sequence[int]) -> list[np.ndarray]:
        return [np.concatenate(known) for _ in sizes]

    def need(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> None:
        ends = np.cumsum([len(mask) for mask in ins])[:-1]
        for out in outs:
            for mask, part in zip(ins, np.split(out, ends)):
                tie(mask, part)


class Regrouping(Rule):
    """Flatten and Reshape: if the last axis changes its length, the longer one repeats the channels of the shorter.

    The numbers keep their order, so a channel is an index modulo the length of the shorter axis.
    """

    has_sizes = True

    @classmethod
    def fits(cls, layer: Any, inputs: Sequence[Shape]) -> bool:
        if not one_input(layer, inputs) or len(layer.compute_output_shape(inputs[0])) < 2:
            return False
        before, after = inputs[0][-1], layer.compute_output_shape(inputs[0])[-1]
        return bool(before and after) and max(before, after) % min(before, after) == 0

    def constants(self, known: list[np.ndarray], sizes: Sequence[int]) -> list[np.ndarray]:
        return [self._constants(known[0], size) for size in sizes]

    def _constants(self, value: np.ndarray, size: int) -> np.ndarray:
        if size >= len(value):
            return np.tile(value, size // len(value))
        rows = value.reshape(-1, size)
        return np.where((rows == rows[0]).all(axis=0), rows[0], np.nan)

    def need(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> None:
        for out in outs:
            size = min(len(ins[0]), len(out))
            tie(*ins[0].reshape(-1, size), *out.reshape(-1, size))

    def cut(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> Cut:
        if not isinstance(self.layer, layers.Reshape):
            return {}, []
        return {"target_shape": (*self.layer.target_shape[:-1], int(outs[0].sum()))}, []


class Permutation(PassThrough):
    """Permute, if the last axis stays last."""

    @classmethod
    def fits(cls, layer: Any, inputs: Sequence[Shape]) -> bool:
        return super().fits(layer, inputs) and layer.dims[-1] == len(layer.dims)


class Affine(Rule):
    """Dense layers and convolutions: activation(Σ x·W + b), with one matrix W, or one for each tap of a filter."""

    @classmethod
    def fits(cls, layer: Any, inputs: Sequence[Shape]) -> bool:
        return one_input(layer, inputs) and getattr(layer, "groups", 1) == 1 and is_as_built(layer)

    def __init__(self, layer: Any, *place: Any):
        super().__init__(layer, *place)
        self.taps = self._taps()
        self.bias = to_numpy(layer.bias) if layer.use_bias else np.zeros(self.taps.shape[-1], "float32")

    @property
    def _is_transposed(self) -> bool:
        return isinstance(self.layer, (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose))

    def _taps(self) -> np.ndarray:
        """Return the kernel as an array (taps, inputs, outputs)."""
        kernel = to_numpy(self.layer.kernel)
        kernel = np.swapaxes(kernel, -1, -2) if self._is_transposed else kernel
        return kernel.reshape(-1, *kernel.shape[-2:])

    def _kernels(self, into: np.ndarray, out: np.ndarray) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Return the arguments that change, and the kernels of the channels that are kept."""
        kernel = to_numpy(self.layer.kernel)
        rows, columns = (out, into) if self._is_transposed else (into, out)
        return {}, [kernel[..., rows, :][..., columns]]

    def _usable(self, known: list[np.ndarray]) -> np.ndarray:
        """Return the constants that hold at the borders too: only 0 with padding or in a transposed convolution."""
        borders = self._is_transposed or getattr(self.layer, "padding", "valid") != "valid"
        return zeros_only(known[0]) if borders else known[0]

    def constants(self, known: list[np.ndarray], sizes: Sequence[int]) -> list[np.ndarray]:
        if not is_elementwise(self.layer.activation):
            return super().constants(known, sizes)
        value = self._usable(known)
        varies = (self.taps[:, np.isnan(value)] != 0).any(axis=(0, 1))
        constant = _apply(self.layer.activation, self._folded(value, ~np.isnan(value)))
        return [np.where(varies, np.nan, constant) for _ in sizes]

    def _folded(self, value: np.ndarray, channels: np.ndarray) -> np.ndarray:
        """Return the bias plus the contribution of these constant channels."""
        return self.bias + np.einsum("c,tcu->u", value[channels], self.taps[:, channels].astype("float64"))

    def need(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> None:
        (out,) = outs
        out |= not is_elementwise(self.layer.activation)  # such as softmax, which depends on all channels
        ins[0] |= (self.taps[:, :, out] != 0).any(axis=(0, 2)) & np.isnan(self._usable(known))

    def cut(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> Cut:
        (into,), (out,) = ins, outs
        bias = self._folded(self._usable(known), ~into & ~np.isnan(self._usable(known)))[out]
        changes, kernels = self._kernels(into, out)
        changes["units" if isinstance(self.layer, layers.Dense) else "filters"] = int(out.sum())
        if not self.layer.use_bias and not bias.any():
            return changes, kernels
        return {**changes, "use_bias": True}, [*kernels, bias]


class Separable(Affine):
    """A depthwise convolution followed by a matrix."""

    def _parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the two kernels as (taps, inputs, multiplier) and (inputs, multiplier, outputs)."""
        depthwise, pointwise = map(to_numpy, (self.layer.depthwise_kernel, self.layer.pointwise_kernel))
        depthwise = depthwise.reshape(-1, *depthwise.shape[-2:])
        return depthwise, pointwise.reshape(*depthwise.shape[1:], -1)

    def _taps(self) -> np.ndarray:
        return np.einsum("tcm,cmu->tcu", *(part.astype("float64") for part in self._parts()))

    def _kernels(self, into: np.ndarray, out: np.ndarray) -> tuple[dict[str, Any], list[np.ndarray]]:
        depthwise, pointwise = self._parts()
        depthwise, pointwise = depthwise[:, into], pointwise[into][..., out]
        alive = depthwise.any(axis=0) & pointwise.any(axis=-1)
        kept = first(alive, most(alive))
        depthwise = np.take_along_axis(depthwise, kept[None], axis=2)
        pointwise = np.take_along_axis(pointwise, kept[..., None], axis=1)
        rank = len(self.layer.kernel_size)
        return {"depth_multiplier": kept.shape[1]}, [
            depthwise.reshape(*self.layer.kernel_size, *depthwise.shape[1:]),
            pointwise.reshape(*[1] * rank, -1, pointwise.shape[-1]),
        ]


class Depthwise(Rule):
    """Depthwise convolution: each input channel gives `depth_multiplier` output channels."""

    @classmethod
    def fits(cls, layer: Any, inputs: Sequence[Shape]) -> bool:
        return PassThrough.fits(layer, inputs)

    def need(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> None:
        for out in outs:
            groups = out.reshape(len(ins[0]), -1)
            ins[0] |= groups.any(axis=1)
            groups |= ins[0][:, None]

    def cut(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> Cut:
        kernel, *bias = self.layer.get_weights()
        return {}, [kernel[..., ins[0], :], *(each[outs[0]] for each in bias)]


class Table(Rule):
    """An embedding: its inputs are indices, and its output channels are the columns of a table.

    Equal rows are merged if that is smaller: a first embedding then maps a word to the index of its row.
    """

    reads_channels = False

    @classmethod
    def fits(cls, layer: Any, inputs: Sequence[Shape]) -> bool:
        return is_as_built(layer)

    def constants(self, known: list[np.ndarray], sizes: Sequence[int]) -> list[np.ndarray]:
        (table,) = self.layer.get_weights()
        return [np.where((table == table[0]).all(axis=0), table[0], np.nan) for _ in sizes]

    def need(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> None:
        """Need nothing: the table can lose any column."""

    def cut(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> Cut:
        (table,) = self.layer.get_weights()
        table = table[:, outs[0]]
        alone = int(self.layer.mask_zero)  # the row of word 0 is then masked, so it stays separate
        rows, index = np.unique(table[alone:] + np.zeros((), table.dtype), axis=0, return_inverse=True)
        rows = np.concatenate([table[:alone], rows])
        index = np.concatenate([np.arange(alone), index.reshape(-1) + alone])
        shape = self._common_shape()
        if shape is None or index.size * 4 + rows.nbytes >= table.nbytes or len(rows) > _EXACT_INTEGERS:
            return {"output_dim": table.shape[1]}, [table]
        return self._in_two(shape, rows), [index[:, None].astype("float32"), rows]

    def _common_shape(self) -> Shape | None:
        """Return the input shape of all calls, with None for sizes that differ; or None if a split is impossible."""
        shapes = [inputs[0] for inputs in self.shapes]
        if len({len(shape) for shape in shapes}) != 1:
            return None
        if self.layer.mask_zero and "int" not in self.layer.input.dtype:  # 0.5 selects word 0 without being masked
            return None
        shape = [sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes)]
        return None if shape[1:].count(None) > 1 else tuple(shape)

    def _in_two(self, shape: Shape, rows: np.ndarray) -> keras.Sequential:
        config = self.layer.get_config()
        return keras.Sequential(
            [
                keras.Input(batch_shape=shape, dtype=self.layer.input.dtype),
                layers.Embedding(self.layer.input_dim, 1, trainable=False, dtype="float32", name="row"),
                layers.Reshape([-1 if size is None else size for size in shape[1:]], dtype="float32", name="shape"),
                layers.Embedding.from_config({**config, "input_dim": len(rows), "output_dim": rows.shape[1]}),
            ],
            name=self.layer.name,
        )


_ELEMENTWISE = """celu elu exponential gelu hard_shrink hard_sigmoid hard_silu hard_tanh leaky_relu linear log_sigmoid
    mish relu relu6 selu sigmoid silu soft_shrink softplus softsign sparse_plus squareplus tanh tanh_shrink threshold"""
_EXACT_INTEGERS = 2**24  # float32 holds all integers up to this


def one_input(layer: Any, inputs: Sequence[Shape]) -> bool:
    return len(inputs) == 1 and getattr(layer, "data_format", "channels_last") == "channels_last"


def is_as_built(layer: Any) -> bool:
    """Return whether a layer has the weights it was built with: neither quantized nor with a low-rank adaptation."""
    return getattr(layer, "quantization_mode", None) is None and not getattr(layer, "lora_enabled", False)


def _of_channels(shape: Shape) -> list[Shape]:
    """Return the shapes of arrays that broadcast to an input of this shape with one number for each channel."""
    return [(*[1] * more, shape[-1]) for more in range(len(shape))]


def is_elementwise(activation: Any) -> bool:
    return activation is None or activation in {getattr(activations, name) for name in _ELEMENTWISE.split()}


def _apply(function: Callable[[Any], Any], values: np.ndarray) -> np.ndarray:
    """Apply an elementwise function of tensors to an array."""
    return to_numpy(function(ops.convert_to_tensor(values, "float32"))).astype("float64")


def zeros_only(value: np.ndarray) -> np.ndarray:
    return np.where(value == 0.0, 0.0, np.nan)


def most(alive: np.ndarray) -> int:
    """Return the largest number of True values in a row, but at least 1."""
    return max(int(alive.sum(axis=-1).max()), 1)


def first(alive: np.ndarray, width: int) -> np.ndarray:
    """Return `width` indices into each row (the last axis): those of the True values first, then others."""
    return np.argsort(~alive, axis=-1, kind="stable")[..., :width]


def tie(*masks: np.ndarray) -> None:
    """Set each mask, in place, to the union of all: what one keeps, all keep."""
    union = np.logical_or.reduce(masks)
    for mask in masks:
        mask |= union


def rewrapped(serialized: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a serialized inner layer with changed arguments."""
    return {
        **{name: value for name, value in serialized.items() if name != "build_config"},
        "config": {**serialized["config"], **changes},
    }
