"""Recurrent layers: one draw a sequence, held over time, in every way that Keras runs an RNN."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_vdrop as kv
from keras_vdrop.layers.cells import RecurrentCell
from tests.cases import array, randomize
from tests.statistics import assert_mean, assert_variance

RNG = np.random.default_rng(0)
B, T, D, U = 2, 6, 3, 4
X = RNG.normal(size=(B, T, D)).astype("float32")


FAMILIES = {
    "lstm": (kv.VariationalLSTM, kv.VariationalLSTMCell, layers.LSTM),
    "gru": (kv.VariationalGRU, kv.VariationalGRUCell, layers.GRU),
    "simple_rnn": (kv.VariationalSimpleRNN, kv.VariationalSimpleRNNCell, layers.SimpleRNN),
}
FLIPOUT = {"estimator": "flipout"}


@pytest.fixture(params=[False, True], ids=["graph", "jit"])
def jit(request):
    return request.param


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def rnn(family="lstm", **arguments):
    """A recurrent layer with strong noise."""
    layer = FAMILIES[family][0](U, **{"kl_weight": 0.1, "return_sequences": True, **arguments})
    layer.build((B, T, D))
    randomize(layer, log_variance=(-2.0, 0.0))
    return layer


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(layer, x, of_inputs, of_state):
    """The equations in NumPy: pre-activations of all gates are `of_inputs(x_t) + of_state(h)`."""
    h, c, outputs = np.zeros((len(x), U)), np.zeros((len(x), U)), []
    for t in range(x.shape[1]):
        if isinstance(layer, layers.LSTM):
            i, f, z, o = np.split(of_inputs(x[:, t]) + of_state(h), 4, axis=-1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(z)
            h = sigmoid(o) * np.tanh(c)
        elif isinstance(layer, layers.SimpleRNN):
            h = np.tanh(of_inputs(x[:, t]) + of_state(h))
        else:
            x_z, x_r, x_h = np.split(of_inputs(x[:, t]), 3, axis=-1)
            h_z, h_r, h_h = np.split(of_state(h), 3, axis=-1)
            z, r = sigmoid(x_z + h_z), sigmoid(x_r + h_r)
            if not layer.reset_after:
                h_h = of_state(r * h)[:, 2 * U :]
            h = z * h + (1 - z) * np.tanh(x_h + r * h_h if layer.reset_after else x_h + h_h)
        outputs.append(h)
    return np.stack(outputs, axis=1)


def in_numpy(product):
    """A `Product` as a function of NumPy arrays, written out."""
    matrix, bias = array(product.matrix), 0.0 if product.bias is None else array(product.bias)
    masks = [1.0 if mask is None else array(mask) for mask in product.masks]

    def apply(x):
        if product.flips is None:
            columns = [(x * mask) @ matrix for mask in masks]
        else:
            delta, of_input, of_output = map(array, product.flips)
            columns = [(x * mask) @ matrix + ((x * mask * of_input) @ delta) * of_output for mask in masks]
        if len(masks) > 1:
            columns = [column[:, gate * U : (gate + 1) * U] for gate, column in enumerate(columns)]
        return np.concatenate(columns, axis=-1) + bias

    return apply


@pytest.fixture
def drawn(monkeypatch):
    """The noisy products of every call, in order: of the inputs, of the state."""
    seen = []
    draw = RecurrentCell._product

    def remember(cell, operand, like, noisy):
        product = draw(cell, operand, like, noisy)
        if noisy:
            seen.append(product)
        return product

    monkeypatch.setattr(RecurrentCell, "_product", remember)
    return seen


EVERYTHING = {"dropout": 0.3, "recurrent_dropout": 0.4, "weight_dropout": 0.3, "bias_prior": "ard"}
NOISES = {
    "weights": {},
    "flipout": {**FLIPOUT, "bias_prior": "normal"},
    "masks": {"kernel_prior": None, "dropout": 0.3, "recurrent_dropout": 0.4},
    "all_tied": {**EVERYTHING, **FLIPOUT},
    "all_per_gate": {**EVERYTHING, **FLIPOUT, "tied_masks": False},
}


@pytest.mark.slow(keep=8)
@pytest.mark.parametrize("options", NOISES.values(), ids=NOISES)
def test_one_draw_for_all_steps_and_a_fresh_one_for_each_call(family, options, drawn):
    layer = rnn(family, **options)
    for _ in range(2):
        output = array(layer(X, training=True))
        expected = by_hand(layer, X, *map(in_numpy, drawn[-2:]))
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)
    assert len(drawn) == 4
    assert not np.array_equal(array(layer(X, training=True)), output)


@pytest.mark.parametrize("options", [{}, {"tied_masks": False, "recurrent_dropout": 0.5}], ids=["tied", "per_gate"])
def test_gru_with_the_reset_gate_before_the_product(options, drawn):
    layer = rnn("gru", reset_after=False, **FLIPOUT, **options)
    output = array(layer(X, training=True))
    np.testing.assert_allclose(output, by_hand(layer, X, *map(in_numpy, drawn)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow(keep=1)
def test_draws_are_of_the_posterior(family, drawn):
    layer = rnn(family)
    for _ in range(200):
        layer(X[:, :1], training=True)
    kernels = np.stack([array(product.matrix) for product in drawn[::2]])
    kernel = layer.cell.kernel
    standard = (kernels - array(kernel.loc)) / np.exp(0.5 * array(kernel.log_variance))
    assert abs(standard.mean()) < 5 / np.sqrt(standard.size)
    assert abs(standard.var() - 1) < 5 * np.sqrt(2 / standard.size)


def test_flipout_signs_are_exact_and_each_examples_own(drawn):
    layer = rnn(**FLIPOUT)
    layer(np.repeat(X[:1], 50, axis=0), training=True)
    for product in drawn:
        _, of_input, of_output = map(array, product.flips)
        for signs in (of_input, of_output):
            assert set(np.unique(signs)) == {-1.0, 1.0}
            assert len(np.unique(signs, axis=0)) > 4


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, FLIPOUT], ids=["reparameterization", "flipout"])
def test_estimators_have_the_mean_and_variance_of_the_pre_activations(options, drawn):
    layer = rnn(bias_prior="normal", **options)
    cell = layer.cell
    for _ in range(200):
        layer(X[:, :1], training=True)
    draws = np.stack([in_numpy(product)(X[:, 0]) for product in drawn[::2]])
    assert_mean(draws, X[:, 0] @ array(cell.kernel.loc) + array(cell.bias.loc))
    variance = X[:, 0] ** 2 @ np.exp(array(cell.kernel.log_variance)) + np.exp(array(cell.bias.log_variance))
    assert_variance(draws, variance)


def test_examples_share_one_draw_or_not():
    same = np.repeat(X[:1], 3, axis=0)
    one = array(rnn()(same, training=True))
    np.testing.assert_allclose(one, np.repeat(one[:1], 3, axis=0), atol=1e-6)
    own = array(rnn(**FLIPOUT)(same, training=True))
    assert not np.allclose(own[0], own[1], atol=1e-3)


def test_nothing_is_held_after_a_call(family):
    layer = rnn(family, output_dropout=0.5)
    layer(X, training=True)
    assert layer.cell._held is None
    with pytest.raises(Exception):  # noqa: B017
        layer(X, initial_state=[np.zeros((B, U + 1), "float32")] * len(layer.state_size), training=True)
    assert layer.cell._held is None


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("bare", [False, True], ids=["layer", "bare_cell"])
def test_prediction_does_not_move_the_noise(family, bare):
    cell = FAMILIES[family][1](U, seed=1, kl_weight=0.1, dropout=0.5, output_dropout=0.5)
    layer = layers.RNN(cell) if bare else FAMILIES[family][0](U, seed=1, kl_weight=0.1, dropout=0.5)
    model = keras.Sequential([keras.Input((T, D)), layer])
    generator = (cell if bare else layer.cell).seed_generator
    before = array(generator.state)
    model.predict(X, verbose=0)
    model(X)
    np.testing.assert_array_equal(array(generator.state), before)
    model(X, training=True)
    assert not np.array_equal(array(generator.state), before)


def test_a_bare_cell_is_the_layer(family):
    layer = rnn(family, seed=3, dropout=0.3, output_dropout=0.2)
    cell = FAMILIES[family][1](U, seed=3, kl_weight=0.1, dropout=0.3, output_dropout=0.2)
    bare = layers.RNN(cell, return_sequences=True)
    bare.build((B, T, D))
    bare.set_weights(layer.get_weights())
    np.testing.assert_array_equal(array(layer(X)), array(bare(X)))
    np.testing.assert_array_equal(array(layer(X, training=True)), array(bare(X, training=True)))


def test_a_cell_called_by_itself_draws_for_the_step(family):
    cell = rnn(family, dropout=0.5, output_dropout=0.1).cell
    states = [keras.ops.zeros((B, U))] * len(keras.tree.flatten(cell.state_size))
    one, other = (array(cell(X[:, 0], states, training=True)[0]) for _ in range(2))
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(*(array(cell(X[:, 0], states)[0]) for _ in range(2)))


def equal_twin(layer, twin, *arguments, **keywords):
    """The layer predicts what Keras's does with the same means."""
    twin.build((B, T, D))
    for name in ("kernel", "recurrent_kernel"):
        getattr(twin.cell, name).assign(array(getattr(layer.cell, name).loc))
    if layer.use_bias:
        twin.cell.bias.assign(array(layer.cell.bias))
    ours = keras.tree.flatten(layer(*arguments, **keywords))
    theirs = keras.tree.flatten(twin(*arguments, **keywords))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        np.testing.assert_allclose(array(one), array(other), rtol=1e-5, atol=1e-5)


def twin_of(family, **options):
    cudnn = {} if family == "simple_rnn" else {"use_cudnn": False}
    return FAMILIES[family][2](U, **options, **cudnn)


OPTIONS = [
    {},
    {"return_sequences": False},
    {"go_backwards": True},
    {"unroll": True},
    {"return_state": True},
    {"stateful": True},
    {"zero_output_for_mask": True},
]


@pytest.mark.slow(keep=9)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "plain")
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("initial", [False, True], ids=["zeros", "initial_state"])
def test_options_are_those_of_keras(family, options, masked, initial):
    options = {"return_sequences": True, **options}
    layer = rnn(family, **options)
    keywords = {}
    if masked:
        keywords["mask"] = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
    if initial:
        state = keras.ops.convert_to_tensor(np.random.default_rng(1).normal(size=(B, U)), "float32")
        keywords["initial_state"] = [state] * len(layer.state_size)
    equal_twin(layer, twin_of(family, **options), X, **keywords)
    # with noise, whatever the caller passes, two calls differ and are finite
    runs = [array(keras.tree.flatten(layer(X, training=True, **keywords))[0]) for _ in range(2)]
    assert not np.array_equal(*runs) and np.isfinite(runs).all()


MODELS = [
    ("lstm", {"unit_forget_bias": False, "recurrent_activation": "hard_sigmoid", "activation": "relu"}),
    ("lstm", {"implementation": 1, "use_bias": False}),
    ("gru", {"reset_after": False}),
    ("gru", {"reset_after": False, "implementation": 1, "use_bias": False}),
    ("gru", {"implementation": 1}),
    ("simple_rnn", {"activation": "relu", "use_bias": False}),
]


@pytest.mark.parametrize("model,options", MODELS, ids=lambda o: ",".join(o) if isinstance(o, dict) else o)
def test_variants_are_those_of_keras(model, options):
    options = {"return_sequences": True, **options}
    equal_twin(rnn(model, **options), twin_of(model, **options), X)


def test_it_is_the_keras_layer(family):
    layer = rnn(family, dropout=0.1)
    assert isinstance(layer, FAMILIES[family][2])
    assert layer.units == U and layer.dropout == 0.1 and layer.use_bias


def test_weights_can_be_those_of_a_keras_layer(family):
    twin = twin_of(family)
    twin.build((B, T, D))
    layer = rnn(family, kernel_prior=None, return_sequences=False)
    layer.cell.kernel.assign(twin.cell.kernel), layer.cell.recurrent_kernel.assign(twin.cell.recurrent_kernel)
    layer.cell.bias.assign(twin.cell.bias)
    np.testing.assert_allclose(array(layer(X)), array(twin(X)), rtol=1e-5, atol=1e-6)


def test_stateful_carries_on(family):
    layer = rnn(family, stateful=True)
    stateless = rnn(family)
    stateless.set_weights(layer.get_weights()[: len(stateless.get_weights())])
    whole = array(stateless(X))
    halves = np.concatenate([array(layer(X[:, : T // 2])), array(layer(X[:, T // 2 :]))], axis=1)
    np.testing.assert_allclose(halves, whole, rtol=1e-5, atol=1e-6)
    layer.reset_state()
    np.testing.assert_allclose(array(layer(X[:, : T // 2])), whole[:, : T // 2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("bare", [False, True], ids=["layer", "bare_cell"])
def test_directions_of_bidirectional_draw_different_noise(family, drawn, seed, bare):
    whole, cell, _ = FAMILIES[family]
    arguments = {"seed": seed, "kl_weight": 0.1}
    both = layers.Bidirectional(layers.RNN(cell(U, **arguments)) if bare else whole(U, **arguments))
    both(X)
    drawn.clear()
    both(X, training=True)
    forward, _, backward, _ = (array(product.matrix) for product in drawn)
    means = [array(layer.cell.kernel.loc) for layer in (both.forward_layer, both.backward_layer)]
    assert not np.allclose(forward - means[0], backward - means[1])


def test_stacked_cells():
    stack = layers.RNN([kv.VariationalLSTMCell(U, kl_weight=0.1), kv.VariationalLSTMCell(2, kl_weight=0.1)])
    stack(X)
    randomize(stack)
    np.testing.assert_array_equal(array(stack(X)), array(stack(X)))
    assert not np.array_equal(array(stack(X, training=True)), array(stack(X, training=True)))


@pytest.mark.slow
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

    def test_values_and_shapes(self, drawn):
        layer = rnn(kernel_prior=None, dropout=0.5, recurrent_dropout=0.4)
        layer(np.repeat(X, 25, axis=0), training=True)
        (of_inputs,), (of_state,) = (product.masks for product in drawn)
        assert of_inputs.shape == (50, D) and set(np.unique(array(of_inputs))) == {0.0, 2.0}
        assert of_state.shape == (50, U)
        np.testing.assert_allclose(np.unique(array(of_state)), [0.0, 1 / 0.6], rtol=1e-5)

    def test_one_for_each_gate(self, family, drawn):
        layer = rnn(family, kernel_prior=None, dropout=0.5, tied_masks=False)
        layer(np.repeat(X, 25, axis=0), training=True)
        of_inputs, of_state = drawn
        gates = layer.cell.kernel.shape[-1] // U
        assert len({array(mask).tobytes() for mask in of_inputs.masks}) == gates
        assert of_state.masks == [None]

    def test_of_the_output_is_held_and_does_not_reach_the_state(self, family):
        layer = rnn(family, kernel_prior=None, output_dropout=0.5, return_state=True)
        quiet, noisy = (keras.tree.flatten(layer(X, training=training)) for training in (False, True))
        mask = array(noisy[0]) / array(quiet[0])
        np.testing.assert_allclose(mask, np.repeat(mask[:, :1], T, axis=1), rtol=1e-4)
        assert set(np.unique(mask.round(3))) <= {0.0, 2.0}
        for one, other in zip(quiet[1:], noisy[1:]):
            np.testing.assert_allclose(array(one), array(other), rtol=1e-5)

    def test_off_without_training_and_on_under_sampling(self, family):
        layer = rnn(family, kernel_prior=None, output_dropout=0.5)
        np.testing.assert_array_equal(array(layer(X)), array(layer(X)))
        with kv.sampling():
            assert not np.array_equal(array(layer(X)), array(layer(X)))

    def test_no_kl(self):
        assert not rnn(kernel_prior=None, dropout=0.5).losses


class TestWeightDropout:
    def test_drops_recurrent_weights_for_the_sequence(self, drawn):
        layer = rnn(kernel_prior=None, weight_dropout=0.5)
        layer(X, training=True)
        of_inputs, of_state = drawn
        np.testing.assert_array_equal(array(of_inputs.matrix), array(layer.cell.kernel))
        kept = array(of_state.matrix) != 0
        assert 0.2 < kept.mean() < 0.8
        np.testing.assert_allclose(
            array(of_state.matrix)[kept], 2 * array(layer.cell.recurrent_kernel)[kept], rtol=1e-6
        )

    @pytest.mark.slow(keep=1)
    def test_never_touches_the_parameter(self, jit):
        """Over many steps of training at a rate of 0 nothing accumulates."""
        layer = kv.VariationalLSTM(U, kernel_prior=None, weight_dropout=0.5)
        model = keras.Sequential([keras.Input((T, D)), layer])
        model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=jit)
        before = array(layer.cell.recurrent_kernel)
        for _ in range(100):
            model.train_on_batch(X, np.ones((B, U)))
        np.testing.assert_array_equal(array(layer.cell.recurrent_kernel), before)


@pytest.mark.parametrize("name", ["dropout", "recurrent_dropout", "output_dropout", "weight_dropout"])
@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan"), "half"])
def test_rates_are_in_range(family, name, rate):
    with pytest.raises(ValueError, match=f"`{name}`"):
        FAMILIES[family][0](U, **{name: rate})


@pytest.mark.parametrize("bad", [{"units": 0}, {"units": 2.5}, {"units": U, "estimator": "local_reparameterization"}])
def test_bad_arguments(family, bad):
    with pytest.raises(ValueError, match="Received"):
        FAMILIES[family][0](**bad)


def test_cudnn_is_not_to_be_had():
    with pytest.raises(ValueError, match="cuDNN"):
        kv.VariationalLSTM(U, use_cudnn=True)
    with pytest.raises(ValueError, match="use_cudnn"):  # Keras's has no such argument
        kv.VariationalSimpleRNN(U, use_cudnn="auto")


def test_blocks_of_a_prior_are_gates():
    prior = kv.priors.ARD(group_axis=-1, blocks=4)
    rnn("lstm", kernel_prior=prior)
    with pytest.raises(ValueError, match="3 gates"):
        rnn("gru", kernel_prior=prior)


def test_a_state_of_the_wrong_shape_fails_as_in_keras(family):
    layer = rnn(family)
    state = [np.zeros((B, U + 1), "float32")] * len(layer.state_size)
    with pytest.raises(Exception) as theirs:
        twin_of(family)(X, initial_state=state)
    with pytest.raises(theirs.type):
        layer(X, initial_state=state)


def test_unrolling_needs_a_known_length(family):
    with pytest.raises(ValueError, match="unroll"):
        rnn(family, unroll=True).call(keras.Input((None, D)))


def test_inputs_must_be_sequences():
    with pytest.raises(ValueError, match="ndim=3"):
        kv.VariationalLSTM(U)(keras.Input((D,)))


@pytest.mark.parametrize("cls", [kv.VariationalLSTM, kv.VariationalGRU, kv.VariationalSimpleRNN])
def test_the_weight_of_the_kl_is_that_of_the_cell(cls):
    layer = cls(3, kl_weight=0.5)
    assert layer.kl_weight == 0.5
    layer.kl_weight = 0.25  # before it is built
    layer.build((None, 4, 2))
    kl = float(kv.kl_divergence(layer))
    assert float(sum(layer.losses)) == pytest.approx(0.25 * kl)
    layer.kl_weight = 0.125
    assert float(layer.kl_weight) == float(layer.cell.kl_weight) == 0.125
    assert float(sum(layer.losses)) == pytest.approx(0.125 * kl)
    layer.free_bits = 1e3
    assert float(layer.free_bits) == 1e3 and float(sum(layer.losses)) > kl
