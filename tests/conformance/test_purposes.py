"""Noise for different purposes in a layer is independent, and so is the noise of different sampling scopes."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_vdrop as kv
from keras_vdrop.functional import noise
from keras_vdrop.sampling import FixedSeeds, drawing, generator_states
from tests.cases import CASES, array, posteriors, randomize
from tests.statistics import assert_uncorrelated

COUNT = 4000
MASKS = {"dropout": 0.3, "recurrent_dropout": 0.3, "output_dropout": 0.3, "weight_dropout": 0.3, "tied_masks": False}
GATES = {kv.VariationalLSTM: 4, kv.VariationalGRU: 3, kv.VariationalSimpleRNN: 1}
RECURRENT = [case for case in CASES if case.is_rnn]
CELLS = [case for case in CASES if case.is_cell]
OTHERS = [case for case in CASES if case.is_kernel and not case.is_rnn and not case.is_cell]


@pytest.fixture
def asked(monkeypatch):
    """Record the seeds that `FixedSeeds.next` returns, in order."""
    seeds, ask = [], FixedSeeds.next

    def recorded(self, ordered=True):
        seed = ask(self, ordered)
        seeds.append(tuple(int(number) for number in ops.convert_to_numpy(seed)))
        return seed

    monkeypatch.setattr(FixedSeeds, "next", recorded)
    return seeds


def taken(asked):
    """Return the recorded seeds and clear the record."""
    seeds = list(asked)
    asked.clear()
    return seeds


def assert_unrelated(seeds):
    """Assert that normal noise from any two of the seeds is uncorrelated, in value and in magnitude."""
    draws = [array(noise.normal((COUNT,), FixedSeeds(ops.convert_to_tensor(seed, "uint32")))) for seed in seeds]
    for one, other in itertools.combinations(draws, 2):
        assert_uncorrelated(one, other)
        assert_uncorrelated(np.abs(one), np.abs(other))


def check(asked, call, count):
    """Assert that every call in a scope takes the same `count` seeds, and that the next scope takes others."""
    every = []
    for _ in range(2):
        with kv.sampling(consistent=True):
            call()
            first = taken(asked)
            call()
            assert set(taken(asked)) == set(first)
        assert len(set(first)) == count
        every += sorted(set(first))
    assert len(set(every)) == 2 * count
    assert_unrelated(every)


def test_draws_of_a_consistent_scope(case, asked):
    layer = case.built(seed=1)
    asked.clear()
    check(asked, lambda: case.call(layer, case.inputs()), max(1, len(posteriors(layer))))


@pytest.mark.parametrize("recurrent", RECURRENT, ids=str)
def test_masks_of_gates(recurrent, asked):
    case = recurrent.replace(**MASKS)
    layer = case.built(seed=1)
    asked.clear()
    count = len(posteriors(layer)) + 2 * GATES[case.cls] + 2
    check(asked, lambda: case.call(layer, case.inputs()), count)


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_draws_that_an_example_keeps(other, asked):
    """The seeds of an example's noise (such as signs and perturbations of flipout) are distinct and unrelated."""
    layer = other.built(seed=1)
    asked.clear()
    with drawing(repeated=map(id, generator_states(keras.Sequential([layer])))):
        other.call(layer, other.inputs())
    seeds = taken(asked)
    assert len(set(seeds)) == len(seeds) >= len(posteriors(layer))
    assert_unrelated(seeds)


def by_hand(cell, x):
    """Call a cell step by step and return the output of the last step."""
    states = cell.get_initial_state(batch_size=len(x))
    for step in range(x.shape[1]):
        output, states = cell(x[:, step], states)
    return array(output)


def stacked():
    return layers.RNN([kv.VariationalLSTMCell(3, **MASKS, seed=1), kv.VariationalGRUCell(2, **MASKS, seed=2)])


@pytest.mark.parametrize(
    "make",
    [stacked, *(lambda case=case: case.replace(**MASKS).make(seed=1) for case in CELLS)],
    ids=["stacked", *map(str, CELLS)],
)
def test_a_cell_by_hand_draws_what_it_draws_in_an_rnn(make, asked):
    layer = make()
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype("float32")
    x[1] = x[0]
    layer(x)
    randomize(layer, log_variance=(-4.0, -1.0))
    drawn = []
    for _ in range(2):
        with kv.sampling(consistent=True):
            drawn.append(array(layer(x)))
            asked.clear()
            by_itself = by_hand(layer.cell, x)
            steps = taken(asked)
        np.testing.assert_allclose(by_itself, drawn[-1], atol=1e-5)
        np.testing.assert_allclose(by_itself[1], by_itself[0], atol=1e-5)
        assert set(steps) == set(steps[: len(steps) // 4])  # all four steps take the seeds of the first
    assert not np.allclose(*drawn, atol=1e-3)
    with kv.sampling():
        assert not np.allclose(array(layer(x)), array(layer(x)), atol=1e-3)
