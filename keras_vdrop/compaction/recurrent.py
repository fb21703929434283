"""How channels pass through recurrent layers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import layers

from keras_vdrop.compaction.graph import Shape
from keras_vdrop.compaction.rules import Cut, Rule, is_elementwise, rewrapped, tie


class Recurrent(Rule):
    """LSTM, GRU, SimpleRNN: a hidden unit is a channel of the outputs and of the states.

    A unit whose candidate for the new state is always 0 has a state that is always 0.
    """

    # The index of the candidate among the gates.
    _CANDIDATE = {layers.LSTM: 2, layers.GRU: 2, layers.SimpleRNN: 0}  # noqa: RUF012

    @classmethod
    def fits(cls, layer: Any, inputs: Sequence[Shape]) -> bool:
        functions = (layer.activation, getattr(layer, "recurrent_activation", None))
        return len(inputs) == 1 and all(map(is_elementwise, functions))

    def __init__(self, layer: Any, *place: Any):
        super().__init__(layer, *place)
        kernel, recurrent, *bias = layer.get_weights()
        self.units = layer.units
        self.kernel, self.recurrent = (each.reshape(len(each), -1, self.units) for each in (kernel, recurrent))
        # A GRU may have two rows of biases: for the product with the inputs and for that with the state.
        gates = self.kernel.shape[1]
        self.bias = bias[0].reshape(-1, gates, self.units) if bias else np.zeros((1, gates, self.units), "float32")

    def _folded(self, value: np.ndarray, channels: np.ndarray) -> np.ndarray:
        bias = self.bias.astype("float64")
        bias[0] += np.einsum("c,cgu->gu", value[channels], self.kernel[channels].astype("float64"))
        return bias

    def _dead(self, value: np.ndarray) -> np.ndarray:
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

    def constants(self, known: list[np.ndarray], sizes: Sequence[int]) -> list[np.ndarray]:
        return [np.where(self._dead(known[0]), 0.0, np.nan) for _ in sizes]

    def need(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> None:
        tie(*outs)
        (into,), out = ins, outs[0]
        alive = ~self._dead(known[0])
        while True:
            more = out | ((self.recurrent[:, :, out] != 0).any(axis=(1, 2)) & alive)
            if (more == out).all():
                break
            out |= more
        tie(*outs)
        into |= (self.kernel[:, :, out] != 0).any(axis=(1, 2)) & np.isnan(known[0])

    def cut(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> Cut:
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


class TwoWays(Rule):
    """Bidirectional around one of these layers. Both directions have, and keep, the same number of units."""

    @classmethod
    def fits(cls, layer: Any, inputs: Sequence[Shape]) -> bool:
        ways = (layer.forward_layer, layer.backward_layer)
        known = all(type(way) in Recurrent._CANDIDATE and Recurrent.fits(way, inputs) for way in ways)
        return known and ways[0].units == ways[1].units and type(ways[0]) is type(ways[1])

    def __init__(self, layer: Any, *place: Any):
        super().__init__(layer, *place)
        self.ways = [Recurrent(way, *place) for way in (layer.forward_layer, layer.backward_layer)]

    def _outputs(self, outs: list[np.ndarray]) -> list[list[np.ndarray]]:
        """Return, for each direction, its output (the same for both if they are merged elementwise) and its states."""
        mode = self.layer.merge_mode
        if mode == "concat":
            handed, states = np.split(outs[0], 2), outs[1:]
        elif mode is None:
            handed, states = outs[:2], outs[2:]
        else:
            handed, states = [outs[0], outs[0]], outs[1:]
        half = len(states) // 2
        return [[handed[0], *states[:half]], [handed[1], *states[half:]]]

    def constants(self, known: list[np.ndarray], sizes: Sequence[int]) -> list[np.ndarray]:
        forward, backward = (way.constants(known, [0])[0] for way in self.ways)
        if self.layer.merge_mode == "concat":
            handed = [np.concatenate([forward, backward])]
        elif self.layer.merge_mode is None:
            handed = [forward, backward]
        elif self.layer.merge_mode == "mul":
            handed = [np.where((forward == 0.0) | (backward == 0.0), 0.0, np.nan)]
        else:
            handed = [forward + backward]
        states = (len(sizes) - len(handed)) // 2
        return [*handed, *[forward] * states, *[backward] * states]

    def need(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> None:
        for way, mine in zip(self.ways, self._outputs(outs)):
            way.need(known, ins, mine)

    def settle(self, outs: list[np.ndarray]) -> None:
        super().settle(outs)
        ways = self._outputs(outs)
        units = max(int(mine[0].sum()) for mine in ways)
        for way, (handed, *_) in zip(self.ways, ways):
            weights = (way.kernel != 0).sum(axis=(0, 1)) + (way.recurrent != 0).sum(axis=(0, 1))
            cheapest = np.argsort(np.where(handed, -1, weights), kind="stable")
            handed[cheapest[:units]] = True

    def cut(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> Cut:
        config, weights = self.layer.get_config(), []
        for name, way, mine in zip(("layer", "backward_layer"), self.ways, self._outputs(outs)):
            changes, values = way.cut(known, ins, mine)
            config[name] = rewrapped(config[name], changes)
            weights += values
        return {name: config[name] for name in ("layer", "backward_layer")}, weights
