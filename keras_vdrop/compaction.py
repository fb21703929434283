"""`compact`: a smaller model of Keras's own layers that computes the same function.

A channel is an index on the last axis of a tensor. Two things are found out about each: whether it is the same number
for every input, and whether anything needs it. How they go through a layer of a known kind, its `Rule` says. Constants
run forward, once. Needs run both ways until nothing changes; they only grow, so they end at the smallest set that is
consistent. Then weights are cut, and what constants contribute goes into the next bias.
"""

import contextlib
import dataclasses

import keras
import numpy as np
from keras import activations, layers, ops

from keras_vdrop.conversion import input_structure, is_graph, known_layers, stock_twin, take_over, to_deterministic
from keras_vdrop.posterior import posteriors, prunable_weights
from keras_vdrop.pruning import sparsity, warn_of_empty_layers


def compact(model, threshold=None, x=None):
    """A model of stock Keras layers with smaller shapes and the same predictions.

    Units, filters and channels on which nothing depends vanish, and those whose output is constant go into the next
    bias; embeddings lose dimensions and recurrent layers hidden units in the same way. This goes through activations,
    pooling, padding, BatchNormalization, dropout, Flatten, merging layers, branches, shared layers and models within
    the model (of which each has its own copy of a layer that they share with others). Any other layer keeps its shape,
    and so do inputs and outputs. What is left unstructured stays zero in the smaller kernels.

    Args:
        model: A built Functional or Sequential model of our layers, or of Keras's with zeros in their kernels. It stays
            as it is.
        threshold: As for `sparsity`: weights whose log alpha is above it are zero in the result.
        x: Arrays, as `model` takes them, on the first 256 rows of which the two are compared, besides made-up ones.

    Returns:
        A model of the same kind, not compiled.

    Raises:
        ValueError: As `to_deterministic`; and where no made-up inputs will do and `x` is None.
        RuntimeError: If the two do not predict the same, to 1e-5 of the largest output (with layers that compute in
            float16 to 1e-2, in bfloat16 to 5e-2).

    Example:
        >>> import keras, keras_vdrop as kv
        >>> model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(8), kv.VariationalDense(2)])
        >>> noisy = model.layers[0].kernel.log_variance
        >>> _ = noisy.assign(keras.ops.concatenate([noisy[:, :2] - 20.0, noisy[:, 2:] + 30.0], axis=1))
        >>> kv.compact(model).layers[0].units
        2

    Reference:
        Group Sparse Regularization for Deep Neural Networks, Scardapane et al., 2017, https://arxiv.org/abs/1607.00485
    """
    if posteriors(model) and prunable_weights(model):
        warn_of_empty_layers(sparsity(model, threshold))

    def value(weight):
        mean = weight.mean()
        return ops.where(weight.keep_mask(threshold), mean, 0.0) if weight.prunable else mean

    exact, inputs = to_deterministic(model), _inputs(model, x)
    _compare(model, exact, inputs)
    large = stock_twin(model, value)
    small = _shrink(large)
    _compare(large, small, inputs)
    return small


# The comparison

_TOLERANCE = {"float16": 1e-2, "bfloat16": 5e-2}
_ROWS = 256


def _compare(large, small, inputs):
    """Raise a `RuntimeError` unless both models predict the same."""
    tolerance = max(_TOLERANCE.get(layer.compute_dtype, 1e-5) for layer in large._flatten_layers())
    for x in inputs:
        with _forgetting(large), _forgetting(small):
            pairs = zip(*(keras.tree.flatten(model(x, training=False)) for model in (large, small)))
            for expected, found in ((_floats(expected), _floats(found)) for expected, found in pairs):
                both_nan = np.isnan(expected) & np.isnan(found)
                error = np.max(np.where(both_nan, 0.0, np.abs(expected - found)), initial=0.0)
                largest = np.max(np.abs(expected), initial=1e-3, where=~np.isnan(expected))
                if not error <= tolerance * largest:
                    raise RuntimeError(
                        f"The smaller model does not predict what {large.name!r} does: outputs of up to {largest:.3g} "
                        f"differ by {error:.3g}. It was dropped; please report this as a fault of `compact`."
                    )


def _floats(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32")).astype("float64")


@contextlib.contextmanager
def _forgetting(model):
    """Recurrent layers that keep their state begin without one, and have their own again afterwards."""
    keeping = [layer for layer in model._flatten_layers() if isinstance(layer, layers.RNN) and layer.stateful]
    states = [state for layer in keeping for state in keras.tree.flatten(layer.states)]
    before = [ops.convert_to_numpy(state) for state in states]
    for layer in keeping:
        layer.reset_state()
    try:
        yield
    finally:
        for state, value in zip(states, before):
            state.assign(value)


def _inputs(model, x):
    """On which models are compared: the first rows of `x`, and made-up ones where the model can take them."""
    given = [] if x is None else [keras.tree.map_structure(lambda each: ops.convert_to_tensor(each[:_ROWS]), x)]
    for length in (8, 64):
        try:
            made_up = _made_up_inputs(model, length)
            with _forgetting(model):
                model(made_up, training=False)
        except Exception as error:
            failure = error
        else:
            return [made_up, *given]
    if not given:
        raise ValueError(
            f"The model {model.name!r} does not run on made-up inputs ({type(failure).__name__}: {failure}). Pass "
            "`x=`, real ones on which to compare."
        ) from failure
    return given


def _made_up_inputs(model, length, examples=4):
    """Normal numbers, or indices into the smallest table; `length` where the model leaves the size open."""
    rng = np.random.default_rng(0)
    tables = [layer.input_dim for layer in model._flatten_layers() if isinstance(layer, layers.Embedding)]

    def made_up(x):
        shape = [examples if x.shape[0] is None else x.shape[0]]
        shape += [length if size is None else size for size in x.shape[1:]]
        values = rng.integers(0, min(tables, default=2), shape) if "int" in x.dtype else rng.normal(size=shape)
        return ops.convert_to_tensor(values, x.dtype)

    return keras.tree.map_structure(made_up, input_structure(model))


# The graph


@dataclasses.dataclass(frozen=True)
class Call:
    """A layer at one place of the graph.

    Attributes:
        name: Of the layer.
        inputs, outputs: Keys of tensors: (name of the layer that it comes from, call, index).
        plain: Whether the inputs are all that it was given.
    """

    name: str
    inputs: list
    outputs: list
    plain: bool


@dataclasses.dataclass(frozen=True)
class Graph:
    """Who calls whom in a model.

    Attributes:
        calls: List of `Call`, each after those that it needs.
        shapes: Dict from a tensor's key to its shape.
        outputs: Keys of the model's outputs.
    """

    calls: list
    shapes: dict
    outputs: list


def _sequential_graph(model):
    before = [("", 0, 0)]
    calls, shapes = [Call("", [], before, True)], {before[0]: model.inputs[0].shape}
    for layer in model.layers:
        outputs = keras.tree.flatten(layer.output)
        keys = [(layer.name, 0, index) for index in range(len(outputs))]
        shapes.update(zip(keys, (tensor.shape for tensor in outputs)))
        calls.append(Call(layer.name, before, keys, True))
        before = keys
    return Graph(calls, shapes, before)


def _functional_graph(model):
    config = model.get_config()
    shapes = {}

    def leaves(value):
        """Of a serialized value, the key of each tensor, and None for everything else."""
        if isinstance(value, (list, tuple)):
            return [leaf for each in value for leaf in leaves(each)]
        if not isinstance(value, dict):
            return [None]
        if value.get("class_name") != "__keras_tensor__":
            return leaves(list(value.values()))
        key = tuple(value["config"]["keras_history"])
        shapes[key] = tuple(value["config"]["shape"])
        return [key]

    nodes = []
    for entry in config["layers"]:
        for index, node in enumerate(entry["inbound_nodes"] or [{"args": [], "kwargs": {}}]):
            args = leaves(node["args"])
            # Masks are of places, not of channels; what makes them is none of the layers below, and keeps all it has.
            mask = [key for key in leaves(node["kwargs"].pop("mask", None)) if key]
            by_name = [key for key in leaves(node["kwargs"]) if key]
            inputs = [key for key in args if key] + by_name
            call = Call(entry["name"], inputs, [], all(args) and not by_name)
            nodes.append(((entry["name"], index), {key[:2] for key in inputs + mask}, call))
    outputs = _keys(config["output_layers"])
    shapes.update(zip(outputs, (tensor.shape for tensor in model.outputs)))

    calls, done = [], set()
    while len(calls) < len(nodes):
        for place, needed, call in nodes:
            if place not in done and needed <= done:
                calls.append(dataclasses.replace(call, outputs=[key for key in shapes if key[:2] == place]))
                done.add(place)
    return Graph(calls, shapes, outputs)


def _keys(value):
    """The keys in what Keras writes down for a model's outputs, which may be nested."""
    if isinstance(value, dict):
        value = [value[name] for name in sorted(value)]
    if isinstance(value[0], str):
        return [tuple(value)]
    return [key for each in value for key in _keys(each)]


# What is known of layers


class Rule:
    """How channels go through a layer. This one stands for any layer, of which nothing is known: it needs them all.

    In all methods, `known` is a list of arrays, one an input, the value of a channel where that is constant, else NaN;
    `ins` and `outs` are lists of boolean arrays, one an input and one an output, True for a channel that is kept.

    Attributes:
        layer: The layer, one of Keras's own; None for an operation that is none.
        reads_channels: Whether what is on the last axis of the inputs are channels.
    """

    reads_channels = True

    def __init__(self, layer):
        self.layer = layer

    @classmethod
    def fits(cls, layer, inputs):
        """Whether the rule holds for a layer of its kind on inputs of these shapes."""
        return True

    def constants(self, known, sizes):
        """The outputs' own `known`, of these sizes."""
        return [np.full(size, np.nan) for size in sizes]

    def need(self, known, ins, outs):
        """Set to True, in `ins` and `outs`, what the layer asks for."""
        for mask in (*ins, *outs):
            mask[:] = True

    def cut(self, known, ins, outs):
        """The arguments that change, and the weights."""
        return {}, self.layer.get_weights()


class PassThrough(Rule):
    """Channels stay what they are, each by itself."""

    @classmethod
    def fits(cls, layer, inputs):
        return _one_input(layer, inputs) and _is_elementwise(getattr(layer, "activation", None))

    def of_constants(self, value):
        """What becomes of constants; here nothing."""
        return value

    def constants(self, known, sizes):
        return [self.of_constants(known[0]) for _ in sizes]

    def need(self, known, ins, outs):
        _tie(*ins, *outs)


class Elementwise(PassThrough):
    """A function of each number."""

    def of_constants(self, value):
        return np.where(np.isnan(value), np.nan, _apply(self.layer, value))


class Padding(PassThrough):
    """Zeros come in from the border."""

    def of_constants(self, value):
        return _zeros_only(value)


class Scaling(PassThrough):
    """Rescaling: a scale and an offset for all channels, or for each."""

    def __init__(self, layer):
        super().__init__(layer)
        self.terms = {name: np.asarray(getattr(layer, name)) for name in ("scale", "offset")}

    @classmethod
    def fits(cls, layer, inputs):
        shapes = (np.shape(layer.scale), np.shape(layer.offset))
        return _one_input(layer, inputs) and all(shape in [(), *_of_channels(inputs[0])] for shape in shapes)

    def of_constants(self, value):
        scale, offset = (np.ravel(term) for term in self.terms.values())
        return np.where(scale == 0.0, 0.0, scale * value) + offset

    def cut(self, known, ins, outs):
        return {name: (term[..., ins[0]] if term.ndim else term).tolist() for name, term in self.terms.items()}, []


class Normalization(PassThrough):
    """BatchNormalization: a scale and an offset for each channel."""

    @classmethod
    def fits(cls, layer, inputs):
        return super().fits(layer, inputs) and layer.axis in (-1, len(inputs[0]) - 1)

    def of_constants(self, value):
        *scale_and_offset, mean, variance = (weight.astype("float64") for weight in self.layer.get_weights())
        value = (value - mean) / np.sqrt(variance + self.layer.epsilon)
        if self.layer.scale:
            value = value * scale_and_offset[0]
        return value + scale_and_offset[-1] if self.layer.center else value

    def cut(self, known, ins, outs):
        return {}, [weight[ins[0]] for weight in self.layer.get_weights()]


class Merge(Rule):
    """A function of the numbers at one place of several tensors."""

    _OF = {  # noqa: RUF012
        layers.Add: lambda values: values.sum(axis=0),
        layers.Subtract: lambda values: values[0] - values[1],
        layers.Multiply: lambda values: values.prod(axis=0),
        layers.Average: lambda values: values.mean(axis=0),
        layers.Maximum: lambda values: values.max(axis=0),
        layers.Minimum: lambda values: values.min(axis=0),
    }

    @classmethod
    def fits(cls, layer, inputs):
        return len({(len(shape), shape[-1]) for shape in inputs}) == 1

    def constants(self, known, sizes):
        value = self._OF[type(self.layer)](np.stack(known))
        if isinstance(self.layer, layers.Multiply):
            value = np.where((np.stack(known) == 0.0).any(axis=0), 0.0, value)
        return [value for _ in sizes]

    def need(self, known, ins, outs):
        _tie(*ins, *outs)


class Concatenation(Rule):
    """Channels side by side."""

    @classmethod
    def fits(cls, layer, inputs):
        return layer.axis in (-1, len(inputs[0]) - 1)

    def constants(self, known, sizes):
        return [np.concatenate(known) for _ in sizes]

    def need(self, known, ins, outs):
        places = np.cumsum([len(mask) for mask in ins])[:-1]
        for out in outs:
            for mask, part in zip(ins, np.split(out, places)):
                _tie(mask, part)


class Flattening(Rule):
    """A channel is there once for every place."""

    @classmethod
    def fits(cls, layer, inputs):
        return _one_input(layer, inputs) and None not in inputs[0][1:]

    def constants(self, known, sizes):
        return [np.tile(known[0], size // len(known[0])) for size in sizes]

    def need(self, known, ins, outs):
        for out in outs:
            places = out.reshape(-1, len(ins[0]))
            ins[0] |= places.any(axis=0)
            places |= ins[0]


class Affine(Rule):
    """Dense layers and convolutions: activation(Σ x·W + b), with a matrix W, or one for every tap."""

    @classmethod
    def fits(cls, layer, inputs):
        return _one_input(layer, inputs) and getattr(layer, "groups", 1) == 1 and _is_as_built(layer)

    def __init__(self, layer):
        super().__init__(layer)
        self.kernel = ops.convert_to_numpy(layer.kernel)
        self.bias = ops.convert_to_numpy(layer.bias) if layer.use_bias else np.zeros(self._taps.shape[-1], "float32")

    @property
    def _is_transposed(self):
        return isinstance(self.layer, (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose))

    @property
    def _taps(self):
        """The kernel as (taps, inputs, outputs)."""
        kernel = np.swapaxes(self.kernel, -1, -2) if self._is_transposed else self.kernel
        return kernel.reshape(-1, *kernel.shape[-2:])

    def _usable(self, known):
        """A constant is one only as long as the border does not show."""
        borders = self._is_transposed or getattr(self.layer, "padding", "valid") != "valid"
        return _zeros_only(known[0]) if borders else known[0]

    def constants(self, known, sizes):
        if not _is_elementwise(self.layer.activation):
            return super().constants(known, sizes)
        value = self._usable(known)
        varies = (self._taps[:, np.isnan(value)] != 0).any(axis=(0, 1))
        constant = _apply(self.layer.activation, self._folded(value, ~np.isnan(value)))
        return [np.where(varies, np.nan, constant) for _ in sizes]

    def _folded(self, value, channels):
        """The bias with what these channels, which are constant, contribute."""
        return self.bias + np.einsum("c,tcu->u", value[channels], self._taps[:, channels].astype("float64"))

    def need(self, known, ins, outs):
        (out,) = outs
        out |= not _is_elementwise(self.layer.activation)  # which, as softmax, looks at them all
        ins[0] |= (self._taps[:, :, out] != 0).any(axis=(0, 2)) & np.isnan(self._usable(known))

    def cut(self, known, ins, outs):
        (into,), (out,) = ins, outs
        bias = self._folded(self._usable(known), ~into & ~np.isnan(self._usable(known)))[out]
        rows, columns = (out, into) if self._is_transposed else (into, out)
        kernel = self.kernel[..., rows, :][..., columns]
        size = {"units" if isinstance(self.layer, layers.Dense) else "filters": int(out.sum())}
        if not self.layer.use_bias and not bias.any():
            return size, [kernel]
        return {**size, "use_bias": True}, [kernel, bias]


class Depthwise(Rule):
    """A convolution of each channel by itself, into as many as `depth_multiplier`."""

    @classmethod
    def fits(cls, layer, inputs):
        return PassThrough.fits(layer, inputs)

    def need(self, known, ins, outs):
        for out in outs:
            groups = out.reshape(len(ins[0]), -1)
            ins[0] |= groups.any(axis=1)
            groups |= ins[0][:, None]

    def cut(self, known, ins, outs):
        kernel, *bias = self.layer.get_weights()
        return {}, [kernel[..., ins[0], :], *(each[outs[0]] for each in bias)]


class Table(Rule):
    """An embedding: its inputs are indices, its outputs the columns of a table."""

    reads_channels = False

    @classmethod
    def fits(cls, layer, inputs):
        return _is_as_built(layer)

    def constants(self, known, sizes):
        (table,) = self.layer.get_weights()
        return [np.where((table == table[0]).all(axis=0), table[0], np.nan) for _ in sizes]

    def need(self, known, ins, outs):
        """It needs nothing, and the table can lose any column."""

    def cut(self, known, ins, outs):
        (table,) = self.layer.get_weights()
        return {"output_dim": int(outs[0].sum())}, [table[:, outs[0]]]


class Recurrent(Rule):
    """LSTM, GRU, SimpleRNN: hidden units, whose outputs and states are channels.

    A unit whose candidate for the new state is always 0 has a state that is always 0.
    """

    _CANDIDATE = {layers.LSTM: 2, layers.GRU: 2, layers.SimpleRNN: 0}  # noqa: RUF012

    @classmethod
    def fits(cls, layer, inputs):
        functions = (layer.activation, getattr(layer, "recurrent_activation", None))
        return len(inputs) == 1 and all(map(_is_elementwise, functions))

    def __init__(self, layer):
        super().__init__(layer)
        kernel, recurrent, *bias = layer.get_weights()
        self.units = layer.units
        self.kernel, self.recurrent = (each.reshape(len(each), -1, self.units) for each in (kernel, recurrent))
        # The rows of a GRU's bias: of the product with the inputs, and of that with the state.
        gates = self.kernel.shape[1]
        self.bias = bias[0].reshape(-1, gates, self.units) if bias else np.zeros((1, gates, self.units), "float32")

    def _folded(self, value, channels):
        bias = self.bias.astype("float64")
        bias[0] += np.einsum("c,cgu->gu", value[channels], self.kernel[channels].astype("float64"))
        return bias

    def _dead(self, value):
        candidate = self._CANDIDATE[type(self.layer)]
        if float(self.layer.activation(0.0)) != 0.0:
            return np.zeros(self.units, bool)
        alive = (self.kernel[np.isnan(value), candidate] != 0).any(axis=0)
        alive |= (self._folded(value, ~np.isnan(value))[:, candidate] != 0).any(axis=0)
        while True:
            more = alive | (self.recurrent[alive, candidate] != 0).any(axis=0)
            if (more == alive).all():
                return ~alive
            alive = more

    def constants(self, known, sizes):
        return [np.where(self._dead(known[0]), 0.0, np.nan) for _ in sizes]

    def need(self, known, ins, outs):
        _tie(*outs)
        (into,), out = ins, outs[0]
        alive = ~self._dead(known[0])
        while True:
            more = out | ((self.recurrent[:, :, out] != 0).any(axis=(1, 2)) & alive)
            if (more == out).all():
                break
            out |= more
        _tie(*outs)
        into |= (self.kernel[:, :, out] != 0).any(axis=(1, 2)) & np.isnan(known[0])

    def cut(self, known, ins, outs):
        (into,), out = ins, outs[0]
        bias = self._folded(known[0], ~into & ~np.isnan(known[0]))[..., out]
        kernel, recurrent = self.kernel[into][..., out], self.recurrent[out][..., out]
        weights = [each.reshape(len(each), -1) for each in (kernel, recurrent)]
        size = {"units": int(out.sum())}
        if not self.layer.use_bias and not bias.any():
            return size, weights
        rows = 2 if getattr(self.layer, "reset_after", False) else 1
        bias = np.concatenate([bias, np.zeros((rows - len(bias), *bias.shape[1:]))])
        return {**size, "use_bias": True}, [*weights, bias.reshape((2, -1) if rows == 2 else -1)]


class Nested(Rule):
    """A model within the model: it keeps its inputs and outputs, and is compacted by itself."""

    def cut(self, known, ins, outs):
        small = _shrink(self.layer)
        return small.get_config(), small.get_weights()


_SAME = """
    Identity Dropout SpatialDropout1D SpatialDropout2D SpatialDropout3D GaussianDropout GaussianNoise AlphaDropout
    ActivityRegularization RepeatVector UpSampling1D UpSampling2D UpSampling3D Cropping1D Cropping2D Cropping3D
    MaxPooling1D MaxPooling2D MaxPooling3D AveragePooling1D AveragePooling2D AveragePooling3D
    GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D
    GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D
"""

_RULES = {
    PassThrough: _SAME,
    Elementwise: "Activation ReLU LeakyReLU ELU",
    Scaling: "Rescaling",
    Padding: "ZeroPadding1D ZeroPadding2D ZeroPadding3D",
    Normalization: "BatchNormalization",
    Merge: "Add Subtract Multiply Average Maximum Minimum",
    Concatenation: "Concatenate",
    Flattening: "Flatten",
    Affine: "Dense Conv1D Conv2D Conv3D Conv1DTranspose Conv2DTranspose Conv3DTranspose",
    Depthwise: "DepthwiseConv1D DepthwiseConv2D",
    Table: "Embedding",
    Recurrent: "LSTM GRU SimpleRNN",
}
_RULE_OF = {getattr(layers, name): rule for rule, names in _RULES.items() for name in names.split()}

_ELEMENTWISE = """celu elu exponential gelu hard_shrink hard_sigmoid hard_silu hard_tanh leaky_relu linear log_sigmoid
    mish relu relu6 selu sigmoid silu soft_shrink softplus softsign sparse_plus squareplus tanh tanh_shrink threshold"""


def _one_input(layer, inputs):
    return len(inputs) == 1 and getattr(layer, "data_format", "channels_last") == "channels_last"


def _is_as_built(layer):
    """Whether its weights are those that it was built with: neither quantized nor split in two."""
    return getattr(layer, "quantization_mode", None) is None and not getattr(layer, "lora_enabled", False)


def _of_channels(shape):
    """The shapes of numbers of which each channel of such an input has one."""
    return [(*[1] * more, shape[-1]) for more in range(len(shape))]


def _is_elementwise(activation):
    return activation is None or activation in {getattr(activations, name) for name in _ELEMENTWISE.split()}


def _apply(function, values):
    """A function of a tensor, of each number by itself, on an array."""
    return ops.convert_to_numpy(function(ops.convert_to_tensor(values, "float32"))).astype("float64")


def _zeros_only(value):
    return np.where(value == 0.0, 0.0, np.nan)


def _tie(*masks):
    """What is kept in one is kept in all."""
    union = np.logical_or.reduce(masks)
    for mask in masks:
        mask |= union


# The whole


class Group:
    """A layer that is cut, with all its calls, for which it is cut alike; or one call of any other layer.

    Attributes:
        name: Of the layer.
        calls: Those calls.
        rule: Its `Rule`.
    """

    def __init__(self, layer, calls, shapes, rule=None):
        self.name = calls[0].name
        self.calls = calls
        self.rule = self._rule(layer, shapes) if rule is None else rule

    def _rule(self, layer, shapes):
        if isinstance(layer, keras.Model) and is_graph(layer):
            return Nested(layer)
        kind = _RULE_OF.get(type(layer), Rule)
        inputs = [[shapes[key] for key in call.inputs] for call in self.calls]
        sized = not kind.reads_channels or all(shape and shape[-1] for each in inputs for shape in each)
        if sized and all(call.plain and kind.fits(layer, each) for call, each in zip(self.calls, inputs)):
            return kind(layer)
        return Rule(layer)

    def known(self, known):
        """What is known of the inputs: of several calls' nothing, as it need not be the same."""
        values = [known[key] for key in self.calls[0].inputs]
        return values if len(self.calls) == 1 else [np.full_like(value, np.nan) for value in values]

    def masks(self, kept):
        """What any of the calls keeps of inputs and of outputs, of which a call may have more than another."""

        def union(every):
            longest = max(map(len, every))
            return [
                np.logical_or.reduce([kept[keys[index]] for keys in every if index < len(keys)])
                for index in range(longest)
            ]

        inputs = [call.inputs for call in self.calls] if self.rule.reads_channels else [[]]
        return union(inputs), union([call.outputs for call in self.calls])

    def grow(self, known, kept):
        """Add what the layer needs to `kept`, of all calls alike."""
        ins, outs = self.masks(kept)
        self.rule.need(self.known(known), ins, outs)
        for call in self.calls:
            for keys, masks in ((call.inputs, ins), (call.outputs, outs)):
                for key, mask in zip(keys, masks):
                    kept[key] |= mask
            if not self.rule.reads_channels:
                for key in call.inputs:
                    kept[key][:] = True


def _shrink(model):
    """A model of fewer channels, of one that has only Keras's layers."""
    is_sequential = isinstance(model, keras.Sequential)
    graph = _sequential_graph(model) if is_sequential else _functional_graph(model)
    sizes = {key: (shape[-1] if shape else None) or 0 for key, shape in graph.shapes.items()}
    groups = _groups(model, graph)

    group_of = {key: group for group in groups for call in group.calls for key in call.outputs}
    known = {}
    for call in graph.calls:
        if not call.outputs:
            continue
        group = group_of[call.outputs[0]]
        values = group.rule.constants(group.known(known), [sizes[key] for key in call.outputs])
        known.update(zip(call.outputs, values))

    kept = {key: np.full(size, key in graph.outputs) for key, size in sizes.items()}
    _grow(groups, known, kept)
    for mask in kept.values():
        mask[:1] |= not mask.any()  # a tensor without any channel is none
    _grow(groups, known, kept)

    changes, weights = {}, {}
    for group in groups:
        if group.rule.layer is not None:
            changes[group.name], weights[group.name] = group.rule.cut(group.known(known), *group.masks(kept))
    config = model.get_config()
    for entry in config["layers"]:
        entry.pop("build_config", None)  # of the sizes before
        entry["config"].update(changes.get(entry["config"].get("name"), {}))
    with known_layers(model):
        small = type(model).from_config(config)
    for name, values in weights.items():
        small.get_layer(name).set_weights(values)
    take_over(small)
    return small


def _groups(model, graph):
    by_name = {layer.name: layer for layer in model.layers}
    groups = []
    for name in dict.fromkeys(call.name for call in graph.calls):
        layer, calls = by_name.get(name), [call for call in graph.calls if call.name == name]
        together = Group(layer, calls, graph.shapes)
        if type(together.rule) in (Rule, Nested):
            groups += [Group(layer, [call], graph.shapes, together.rule) for call in calls]
        elif layer.weights or isinstance(together.rule, Scaling):
            groups.append(together)
        else:
            groups += [Group(layer, [call], graph.shapes) for call in calls]
    return groups


def _grow(groups, known, kept):
    """Add what is needed for what is needed."""
    before, after = None, -1
    while before != after:
        for group in reversed(groups):
            group.grow(known, kept)
        before, after = after, sum(int(mask.sum()) for mask in kept.values())
