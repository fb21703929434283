"""`sparsity` counts exactly what `prune` leaves."""

import keras
import numpy as np
import pytest

import keras_vdrop as kv
from tests.cases import array, posteriors, randomize

THRESHOLDS = [-1.0, 0.0, 1.5, 3.0]


@pytest.fixture
def model():
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            kv.VariationalConv2D(4, 3, kl_weight=0.1, name="conv"),
            keras.layers.Reshape((4, 16)),
            keras.layers.RNN(kv.VariationalLSTMCell(3, kl_weight=0.1, name="cell"), name="rnn"),
            keras.Sequential([kv.VariationalDense(5, kl_weight=0.1, bias_prior="ard", name="dense")], name="head"),
        ]
    )
    randomize(model)
    return model


def kernels(model):
    return [weight for weight in posteriors(model) if weight.name != "bias"]


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_counts_are_of_unclipped_log_alpha(model, threshold):
    report = kv.sparsity(model, threshold)
    left = [(array(w.log_variance) - np.log(array(w.loc) ** 2) <= threshold).sum() for w in kernels(model)]
    assert report.left == sum(left)
    assert report.weights == sum(int(np.prod(w.shape)) for w in kernels(model)) == 36 + 16 * 12 + 3 * 12 + 15
    assert report.ratio == report.weights / report.left


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_prune_leaves_as_many_non_zeros_as_were_reported(model, threshold):
    before = kv.sparsity(model, threshold)
    after = kv.prune(model, threshold)
    assert after == before
    assert sum(int((array(w.loc) != 0).sum()) for w in kernels(model)) == before.left
    assert sum(int((array(w.mean()) != 0).sum()) for w in kernels(model)) == before.left


def test_rows_are_layers(model):
    report = kv.sparsity(model)
    assert [row.name for row in report.layers] == ["conv", "rnn/cell", "head/dense"]
    assert sum(row.left for row in report.layers) == report.left
    assert [row.weights for row in report.layers] == [36, 16 * 12 + 3 * 12, 15]


def test_prints_an_aligned_table(model):
    lines = str(kv.sparsity(model)).splitlines()
    structure = [line.split()[0] for line in lines if line.startswith("  ")]
    assert structure == ["filters", "units", "units", "filters"]
    assert lines[-1] == "  filters 4 of 4, units 8 of 8"
    table = [line for line in lines if not line.startswith("  ")]
    assert len({len(line) for line in table}) == 1
    heads = ["layer", "weights", "kept", "kept %", "ratio", "bytes", "kept", "multiply-adds", "kept"]
    assert table[0].split() == " ".join(heads).split()
    assert table[-1].startswith("total")


def test_layers_own_threshold_is_the_default():
    layer = kv.VariationalDense(2, kl_weight=0.1, threshold=-1.0)
    layer.build((None, 2))
    layer.kernel.loc.assign(np.ones((2, 2)))
    layer.kernel.log_variance.assign([[-2.0, 0.0], [2.0, 4.0]])
    assert (kv.sparsity(layer).left, kv.sparsity(layer, 3.0).left) == (1, 3)


@pytest.mark.slow
def test_mask_survives_training_and_saving(model, tmp_path):
    left = kv.prune(model, 0.0).left
    x = np.random.default_rng(0).normal(size=(32, 6, 6, 1))
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.fit(x, np.ones((32, 5)), epochs=2, verbose=0)
    assert sum(int((array(w.mean()) != 0).sum()) for w in kernels(model)) == left
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert sum(int((array(w.mean()) != 0).sum()) for w in kernels(again)) == left
    np.testing.assert_array_equal(model.predict(x, verbose=0), again.predict(x, verbose=0))


def test_pruned_weights_have_no_kl(model):
    kv.prune(model, 0.0)
    (weight,) = posteriors(model.layers[0])
    kept = array(weight.mask).astype(bool)
    elementwise = array(weight.prior.kl(array(weight.loc), array(weight.log_variance)))
    np.testing.assert_allclose(array(weight.kl()), elementwise[kept].sum(), rtol=1e-5)


def test_pruning_everything_leaves_a_model_that_runs(model):
    with pytest.warns(UserWarning, match="No weights are kept in"):
        report = kv.prune(model, -1e6)
    assert report.left == 0 and report.ratio == float("inf")
    assert np.isfinite(model.predict(np.ones((2, 6, 6, 1)), verbose=0)).all()
    model.compile("sgd", "mse")
    assert np.isfinite(model.train_on_batch(np.ones((2, 6, 6, 1)), np.ones((2, 5))))


@pytest.mark.parametrize("function", [kv.sparsity, kv.prune])
@pytest.mark.parametrize("threshold", [np.nan, np.inf, "3"])
def test_threshold_must_be_finite(model, function, threshold):
    with pytest.raises(ValueError, match="`threshold` must be a finite number"):
        function(model, threshold)


@pytest.mark.parametrize("function", [kv.sparsity, kv.prune, kv.kl_divergence])
def test_a_model_without_variational_weights_is_refused(function):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)], name="plain")
    with pytest.raises(ValueError, match="'plain'"):
        function(model)
    with pytest.raises(ValueError, match="not been built"):
        function(keras.Sequential([kv.VariationalDense(1)]))


def test_layers_of_one_name_are_counted_apart():
    stack = keras.layers.RNN([kv.VariationalLSTMCell(4, kl_weight=0.1, name="cell") for _ in range(2)])
    stack(np.zeros((1, 2, 3)))
    assert kv.sparsity(stack).weights == 16 * (3 + 4) + 16 * (4 + 4)


@pytest.mark.parametrize("cls, gates", [(kv.VariationalLSTM, 4), (kv.VariationalGRU, 3), (kv.VariationalSimpleRNN, 1)])
def test_units_and_gates_of_a_recurrent_layer(cls, gates):
    layer = cls(5, kl_weight=0.1)
    layer.build((None, 4, 3))
    randomize(layer, log_variance=(-9.0, -8.0))
    keep = np.ones((gates, 5), bool)
    keep[:, 0] = False  # a unit that depends on nothing
    keep[-1, 1] = False  # one gate of another
    for name, mask in (
        ("kernel", np.zeros((3, gates * 5), bool)),
        ("recurrent_kernel", np.tile(keep.reshape(-1), (5, 1))),
    ):
        getattr(layer.cell, name).mask.assign(mask)
    (row,) = kv.sparsity(layer, threshold=50.0).layers
    assert row.structure["units"] == (4 if gates > 1 else 3, 5)
    assert list(row.structure.values())[1:] == [(4, 5)] * (gates - 1) + [(3, 5)] * (gates > 1)
    assert "units 4 of 5, " in str(kv.sparsity(layer, 50.0)) or gates == 1


def test_one_group_a_unit_prunes_units():
    layer = kv.VariationalLSTM(5, kernel_prior=kv.priors.ARD(group_axis=-1, blocks=4), kl_weight=0.1)
    layer.build((None, 4, 3))
    noisy = np.tile([6.0, -9, 6, -9, -9], 4)
    for weight in posteriors(layer):
        weight.loc.assign(np.ones(weight.shape))
        weight.log_variance.assign(np.broadcast_to(noisy, weight.shape))
    (row,) = kv.prune(layer).layers
    assert row.structure == {
        "units": (3, 5),
        **{f"{gate} gate": (3, 5) for gate in ("input", "forget", "cell", "output")},
    }


def test_words_of_an_embedding():
    layer = kv.VariationalEmbedding(6, 3, kl_weight=0.1)
    layer.build()
    layer.embeddings.mask.assign(np.eye(6, 3, dtype=bool))
    (row,) = kv.sparsity(layer, 1e3).layers
    assert row.structure == {"words": (3, 6), "columns": (3, 3)}


def test_lenet():
    """Its multiply-adds are in the literature: 2,293,000."""
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            kv.VariationalConv2D(20, 5, kl_weight=0.1),
            keras.layers.MaxPooling2D(),
            kv.VariationalConv2D(50, 5, kl_weight=0.1),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            kv.VariationalDense(500, kl_weight=0.1),
            kv.VariationalDense(10, kl_weight=0.1),
        ]
    )
    report = kv.sparsity(model, 50.0)
    assert [row.multiply_adds for row in report.layers] == [288_000, 1_600_000, 400_000, 5_000]
    assert report.multiply_adds == report.multiply_adds_left == 2_293_000
    assert report.bytes == report.bytes_left == 4 * (430_500 + 20 + 50 + 500 + 10)
    assert report.total.structure == {"filters": (70, 70), "units": (510, 510)}
    assert max(map(len, str(report).splitlines())) <= 105


@pytest.mark.parametrize("padding, strides, places", [("same", 1, 35), ("same", 2, 12), ("valid", 2, 6)])
def test_a_convolution_multiplies_at_every_place_of_its_outputs(padding, strides, places):
    layer = kv.VariationalConv2D(3, 3, padding=padding, strides=strides, kl_weight=0.1)
    layer.build((None, 7, 5, 2))
    assert kv.sparsity(layer).multiply_adds == 54 * places
    assert layer.places((None, 7, 5, 2)) == places and layer.places((None, None, 5, 2)) is None


@pytest.mark.parametrize(
    "equation, output_shape, multiply_adds, units",
    [("...d,dhk->...hk", (2, 3), 7 * 30, 6), ("btd,du->bu", (4,), 7 * 20, 4), ("btd,tdu->bu", (4,), 140, 4)],
)
def test_an_einsum_multiplies_at_every_place_that_it_does_not_share_with_the_kernel(
    equation, output_shape, multiply_adds, units
):
    layer = kv.VariationalEinsumDense(equation, output_shape, kl_weight=0.1)
    layer(np.ones((2, 7, 5)))
    (row,) = kv.sparsity(layer, 50.0).layers
    assert row.multiply_adds == multiply_adds and row.structure == {"units": (units, units)}
    ones = layer.linear(np.ones((1, 7, 5), "float32"), np.ones(layer.kernel.shape, "float32"))
    assert array(ones).sum() == multiply_adds


def test_every_call_and_every_step_counts(tmp_path):
    """Of shared layers, in models within models and wrappers; the same when the model is loaded again."""
    dense = kv.VariationalDense(4, kl_weight=0.1, name="shared")
    one = keras.Input((4,))
    within = keras.Model(one, dense(dense(one)), name="within")
    steps = keras.Input((5, 4))
    h = keras.layers.TimeDistributed(within, name="each")(steps)
    h = keras.layers.Bidirectional(kv.VariationalGRU(3, return_sequences=True, kl_weight=0.1), name="both")(h)
    h = keras.layers.RNN([kv.VariationalSimpleRNNCell(2, kl_weight=0.1)], name="stack")(h)
    model = keras.Model(steps, h)
    model.save(tmp_path / "model.keras")
    rest = [5 * 9 * (4 + 3), 5 * 9 * (4 + 3), 5 * 2 * (6 + 2)]
    for each in (model, keras.saving.load_model(tmp_path / "model.keras")):
        assert [row.multiply_adds for row in kv.sparsity(each).layers] == [16 * 2 * 5, *rest]
    outside = keras.Model([one, steps], [dense(one), h])
    assert [row.multiply_adds for row in kv.sparsity(outside).layers] == [16 * (2 * 5 + 1), *rest]


def test_other_models_use_a_layer_too():
    """What else was built of a layer does not count."""
    dense = kv.VariationalDense(4, kl_weight=0.1)
    x = keras.Input((4,))
    once, twice = keras.Model(x, dense(x)), keras.Model(x, dense(dense(x)))
    assert [kv.sparsity(model).multiply_adds for model in (once, twice)] == [16, 32]


def test_a_subclassed_model_is_taken_to_call_each_layer_once():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = kv.VariationalDense(4, kl_weight=0.1)

        def call(self, x):
            return self.dense(x)

    model = Subclassed()
    model(np.zeros((2, 3, 5)))
    assert kv.sparsity(model).multiply_adds == 3 * 20


def test_what_is_not_known_is_not_counted():
    tokens = keras.Input((None,), dtype="int32")
    h = kv.VariationalEmbedding(9, 2, kl_weight=0.1)(tokens)
    outputs = kv.VariationalDense(1, kl_weight=0.1)(kv.VariationalLSTM(3, kl_weight=0.1)(h))
    report = kv.sparsity(keras.Model(tokens, outputs))
    assert [row.multiply_adds for row in report.layers] == [0, None, 3]
    assert report.multiply_adds is None and report.multiply_adds_left is None
    assert str(report).splitlines()[-2].split()[-2:] == ["-", "-"]


@pytest.mark.parametrize("dtype, size", [("float64", 8), ("mixed_float16", 4), ("float16", 2), ("bfloat16", 2)])
def test_bytes_are_of_the_dtype_of_the_variables(dtype, size):
    layer = kv.VariationalDense(3, kl_weight=0.1, dtype=dtype)
    layer.build((None, 2))
    layer.kernel.mask.assign(np.eye(2, 3, dtype=bool))
    report = kv.sparsity(layer, 50.0)
    assert (report.bytes, report.bytes_left) == (size * 9, size * 5)


def test_a_model_of_which_nothing_can_be_pruned():
    model = keras.Sequential([keras.Input((2,)), kv.ConcreteDropout(keras.layers.Dense(3), kl_weight=0.1)])
    report = kv.sparsity(model)
    assert report.layers == () and report.total.counts == (0,) * 6
    assert str(report).splitlines()[-1].startswith("total")


def test_channels_and_filters_of_a_separable_convolution():
    layer = kv.VariationalSeparableConv2D(4, 2, depth_multiplier=2, kl_weight=0.1)
    layer.build((None, 5, 5, 3))
    layer.depthwise_kernel.mask.assign(np.arange(24).reshape(2, 2, 3, 2) % 6 < 4)
    layer.pointwise_kernel.mask.assign(np.arange(24).reshape(1, 1, 6, 4) % 4 < 3)
    (row,) = kv.sparsity(layer, 50.0).layers
    assert row.structure == {"channels": (4, 6), "filters": (3, 4)}
    assert (row.multiply_adds, row.multiply_adds_left) == (16 * 48, 16 * (16 + 18))


@pytest.mark.parametrize(
    ("prior", "given", "expected"),
    [("ard", None, 3.0), (kv.priors.ARD(group_axis=-1), None, 5.0), (kv.priors.ARD(group_axis=-1), 2.0, 2.0)],
)
def test_threshold_of_single_weights_of_groups_and_given(prior, given, expected):
    layer = kv.VariationalDense(2, kernel_prior=prior, threshold=given, kl_weight=0.1)
    layer.build((None, 3))
    layer.kernel.loc.assign(np.ones((3, 2)))
    layer.kernel.log_variance.assign(np.repeat([[expected - 0.1, expected + 0.1]], 3, axis=0))
    assert layer.kernel.threshold == expected
    assert kv.sparsity(layer).left == kv.prune(layer).left == 3
    loaded = kv.VariationalDense.from_config(layer.get_config())
    assert loaded.threshold == given
