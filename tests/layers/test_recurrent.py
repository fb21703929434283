"""Recurrent layers: one draw a sequence, held over time, in every way that Keras runs an RNN."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_vdrop as kv
from tests.cases import array, posteriors, randomize

RNG = np.random.default_rng(0)
B, T, D, U = 2, 6, 3, 4
X = RNG.normal(size=(B, T, D)).astype("float32")


def lstm(**arguments):
    """A VariationalLSTM with strong noise."""
    layer = kv.VariationalLSTM(U, **{"kl_weight": 0.1, "return_sequences": True, **arguments})
    layer.build((B, T, D))
    if arguments.get("kernel_prior", "") is not None:
        randomize(layer, log_variance=(-2.0, 0.0))
    return layer


def by_hand(layer, x, kernel, recurrent_kernel):
    """The LSTM equations in NumPy with given weights."""
    bias, h, c, outputs = array(layer.cell.bias), np.zeros((len(x), U)), np.zeros((len(x), U)), []
    for t in range(x.shape[1]):
        i, f, z, o = np.split(x[:, t] @ kernel + h @ recurrent_kernel + bias, 4, axis=-1)
        i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
        c = f * c + i * np.tanh(z)
        h = o * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs, axis=1)


@pytest.fixture
def drawn(monkeypatch):
    """The held draws of every call, in order."""
    seen = []
    hold = kv.VariationalWeight.hold

    def remember(weight, seed):
        hold(weight, seed)
        seen.append(array(weight._held))

    monkeypatch.setattr(kv.VariationalWeight, "hold", remember)
    return seen


def test_one_draw_for_all_steps_and_a_fresh_one_for_each_call(drawn):
    layer = lstm()
    for _ in range(2):
        output = array(layer(X, training=True))
        kernel, recurrent_kernel = drawn[-2:]
        np.testing.assert_allclose(output, by_hand(layer, X, kernel, recurrent_kernel), rtol=1e-4, atol=1e-5)
    assert len(drawn) == 4
    assert not np.array_equal(drawn[0], drawn[2]) and not np.array_equal(drawn[1], drawn[3])


def test_draws_are_of_the_posterior(drawn):
    layer = lstm()
    for _ in range(200):
        layer(X[:, :1], training=True)
    kernels = np.stack(drawn[::2])
    kernel = layer.cell.kernel
    standard = (kernels - array(kernel.loc)) / np.exp(0.5 * array(kernel.log_variance))
    assert abs(standard.mean()) < 5 / np.sqrt(standard.size)
    assert abs(standard.var() - 1) < 5 * np.sqrt(2 / standard.size)


def test_nothing_is_held_after_a_call():
    layer = lstm()
    layer(X, training=True)
    assert all(weight._held is None for weight in posteriors(layer))


def test_a_bare_cell_is_the_layer():
    layer = lstm(seed=3)
    bare = layers.RNN(kv.VariationalLSTMCell(U, seed=3, kl_weight=0.1), return_sequences=True)
    bare.build((B, T, D))
    bare.set_weights(layer.get_weights())
    np.testing.assert_array_equal(array(layer(X)), array(bare(X)))
    np.testing.assert_array_equal(array(layer(X, training=True)), array(bare(X, training=True)))


def test_a_cell_called_by_itself_draws_for_the_step():
    cell = lstm(dropout=0.5).cell
    states = [keras.ops.zeros((B, U))] * 2
    one, other = (array(cell(X[:, 0], states, training=True)[0]) for _ in range(2))
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(*(array(cell(X[:, 0], states)[0]) for _ in range(2)))


def equal_twin(layer, twin, *arguments, **keywords):
    """The layer predicts what `keras.layers.LSTM` does with the same means."""
    twin.build((B, T, D))
    for name in ("kernel", "recurrent_kernel"):
        getattr(twin.cell, name).assign(array(getattr(layer.cell, name).loc))
    twin.cell.bias.assign(array(layer.cell.bias))
    ours = keras.tree.flatten(layer(*arguments, **keywords))
    theirs = keras.tree.flatten(twin(*arguments, **keywords))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        np.testing.assert_allclose(array(one), array(other), rtol=1e-5, atol=1e-5)


OPTIONS = [
    {},
    {"return_sequences": False},
    {"go_backwards": True},
    {"unroll": True},
    {"return_state": True},
    {"stateful": True},
    {"zero_output_for_mask": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "plain")
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("initial", [False, True], ids=["zeros", "initial_state"])
def test_options_are_those_of_keras(options, masked, initial):
    options = {"return_sequences": True, **options}
    layer = lstm(**options)
    keywords = {}
    if masked:
        keywords["mask"] = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
    if initial:
        keywords["initial_state"] = [keras.ops.convert_to_tensor(RNG.normal(size=(B, U)), "float32")] * 2
    equal_twin(layer, layers.LSTM(U, use_cudnn=False, **options), X, **keywords)
    # with noise, whatever the caller passes, two calls differ and are finite
    runs = [array(keras.tree.flatten(layer(X, training=True, **keywords))[0]) for _ in range(2)]
    assert not np.array_equal(*runs) and np.isfinite(runs).all()


def test_stateful_carries_on():
    layer = lstm(stateful=True)
    whole = array(lstm_like(layer)(X))
    halves = np.concatenate([array(layer(X[:, : T // 2])), array(layer(X[:, T // 2 :]))], axis=1)
    np.testing.assert_allclose(halves, whole, rtol=1e-5, atol=1e-6)
    layer.reset_state()
    np.testing.assert_allclose(array(layer(X[:, : T // 2])), whole[:, : T // 2], rtol=1e-5, atol=1e-6)


def lstm_like(layer):
    """A stateless layer with the same weights."""
    other = lstm()
    other.set_weights(layer.get_weights()[: len(other.get_weights())])
    return other


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("bare", [False, True], ids=["layer", "bare_cell"])
def test_directions_of_bidirectional_draw_different_noise(drawn, seed, bare):
    arguments = {"seed": seed, "kl_weight": 0.1}
    cell, layer = kv.VariationalLSTMCell(U, **arguments), kv.VariationalLSTM(U, **arguments)
    both = layers.Bidirectional(layers.RNN(cell) if bare else layer)
    both(X)
    drawn.clear()
    both(X, training=True)
    forward, _, backward, _ = drawn
    means = [array(layer.cell.kernel.loc) for layer in (both.forward_layer, both.backward_layer)]
    assert not np.allclose(forward - means[0], backward - means[1])


def test_stacked_cells():
    stack = layers.RNN([kv.VariationalLSTMCell(U, kl_weight=0.1), kv.VariationalLSTMCell(2, kl_weight=0.1)])
    stack(X)
    randomize(stack)
    np.testing.assert_array_equal(array(stack(X)), array(stack(X)))
    assert not np.array_equal(array(stack(X, training=True)), array(stack(X, training=True)))


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "jit"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.RNN(kv.VariationalLSTMCell(U, kl_weight=0.1, dropout=0.2, recurrent_dropout=0.2)),
        lambda: layers.RNN([kv.VariationalLSTMCell(U, kl_weight=0.1), kv.VariationalLSTMCell(2, kl_weight=0.1)]),
        lambda: layers.Bidirectional(kv.VariationalLSTM(U, kl_weight=0.1)),
        lambda: kv.VariationalLSTM(U, kl_weight=0.1, stateful=True, unroll=True),
    ],
    ids=["masks", "stacked", "bidirectional", "stateful_unrolled"],
)
def test_fit_and_predict(make, jit):
    model = keras.Sequential([keras.Input(batch_shape=(B, T, D)), layers.Masking(), make(), layers.Dense(1)])
    model.compile("adam", "mse", jit_compile=jit)
    history = model.fit(X, np.ones((B, 1)), batch_size=B, epochs=2, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert np.isfinite(model.predict(X, batch_size=B, verbose=0)).all()


class TestMasks:
    """The masks of Gal and Ghahramani, without variational weights."""

    def test_input_mask_is_the_same_at_every_step(self):
        layer = lstm(kernel_prior=None, dropout=0.5, recurrent_dropout=0.4)
        layer(X, training=True)
        cell = layer.cell
        mask = array(cell.get_dropout_mask(keras.ops.convert_to_tensor(X[:, 0])))
        assert set(np.unique(mask)) <= {0.0, 2.0}
        state_mask = array(cell.get_recurrent_dropout_mask(keras.ops.zeros((50, U))))
        np.testing.assert_allclose(np.unique(state_mask), [0.0, 1 / 0.6], rtol=1e-5)
        cell.reset_dropout_mask(), cell.reset_recurrent_dropout_mask()

    def test_output_is_that_of_masked_inputs_and_states(self, monkeypatch):
        layer = lstm(kernel_prior=None, dropout=0.5)
        masks = []
        draw = type(layer.cell)._draw_mask

        def remember(cell, like, rate):
            mask = draw(cell, like, rate)
            masks.append(mask)
            return mask

        monkeypatch.setattr(type(layer.cell), "_draw_mask", remember)
        output = array(layer(X, training=True))
        (mask,) = [array(mask) for mask in masks if mask is not None]
        masked = by_hand(layer, X * mask[:, None], array(layer.cell.kernel), array(layer.cell.recurrent_kernel))
        np.testing.assert_allclose(output, masked, rtol=1e-4, atol=1e-5)

    def test_off_without_training_and_on_under_sampling(self):
        layer = lstm(kernel_prior=None, dropout=0.5)
        np.testing.assert_array_equal(array(layer(X)), array(layer(X)))
        with kv.sampling():
            assert not np.array_equal(array(layer(X)), array(layer(X)))

    def test_no_kl(self):
        assert not lstm(kernel_prior=None, dropout=0.5).losses


def test_inputs_must_be_sequences():
    with pytest.raises(ValueError, match="ndim=3"):
        kv.VariationalLSTM(U)(keras.Input((D,)))
