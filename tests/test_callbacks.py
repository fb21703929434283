"""The schedule of the KL weight, and what the callbacks log."""

import contextlib
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_vdrop as kv
from tests.cases import array, posteriors

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(64, 4)).astype("float32"), RNG.normal(size=(64, 1)).astype("float32")


@pytest.fixture
def model():
    model = keras.Sequential(
        [keras.Input((4,)), kv.VariationalDense(8, activation="tanh"), kv.VariationalDense(1, bias_prior="normal")]
    )
    model.compile(keras.optimizers.SGD(0.01), "mse")
    return model


class Weights(keras.callbacks.Callback):
    """Notes the KL weights that each epoch was trained with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append({float(array(w.owner.kl_weight)) for w in posteriors(self.model)})


def weights_of(model, elbo, epochs=6, **arguments):
    seen = Weights()
    model.fit(X, Y, epochs=epochs, callbacks=[elbo, seen], verbose=0, **arguments)
    return [value for (value,) in seen.seen]


def test_without_a_schedule_the_weight_is_one_over_n(model):
    np.testing.assert_allclose(weights_of(model, kv.ELBO(64), epochs=2), 1 / 64)


@pytest.mark.slow
def test_linear_warmup(model):
    weights = weights_of(model, kv.ELBO(64, start_epoch=1, warmup_epochs=2))
    np.testing.assert_allclose(weights, np.array([0, 0, 0.5, 1, 1, 1]) / 64)


def test_resuming_continues_the_schedule(model):
    weights = weights_of(model, kv.ELBO(64, warmup_epochs=10), initial_epoch=4)
    np.testing.assert_allclose(weights, np.array([0.4, 0.5]) / 64, rtol=1e-6)


@pytest.mark.parametrize("schedule, half", [("linear", 0.5), ("cubic", 0.125), ("cosine", 0.5)])
def test_named_schedules(schedule, half):
    elbo = kv.ELBO(64, start_epoch=1, warmup_epochs=4, schedule=schedule)
    beta = [elbo.beta(epoch) for epoch in range(7)]
    assert beta[:2] == [0, 0] and beta[5:] == [1, 1] and (np.diff(beta[1:6]) > 0).all()
    np.testing.assert_allclose(beta[3], half)


class BatchWeights(keras.callbacks.Callback):
    """Notes the losses, which are the weighted KL where the data loss is nothing, batch by batch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(logs["loss"])


def batch_betas(model, elbo, jit, **arguments):
    """β in every batch, as the compiled step saw it. (Keras logs the mean over the epoch so far.)"""
    model.compile(keras.optimizers.SGD(0.0), lambda y, prediction: 0.0 * keras.ops.sum(prediction), jit_compile=jit)
    kl = float(array(kv.kl_divergence(model)))
    seen = BatchWeights()
    model.fit(X, Y, batch_size=16, callbacks=[elbo, seen], verbose=0, shuffle=False, **arguments)
    means = np.reshape(seen.seen, (-1, 4)) * elbo.num_examples / kl
    return np.diff(np.concatenate([np.zeros((len(means), 1)), means * np.arange(1, 5)], axis=1), axis=1).ravel()


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "jit"])
def test_schedule_per_batch(model, jit):
    betas = batch_betas(model, kv.ELBO(64, warmup_epochs=2, per="batch"), jit, epochs=3)
    np.testing.assert_allclose(betas, np.minimum(np.arange(12) / 8, 1), atol=2e-4)


def test_schedule_per_batch_resumes(model):
    betas = batch_betas(model, kv.ELBO(64, warmup_epochs=4, per="batch"), False, epochs=3, initial_epoch=2)
    np.testing.assert_allclose(betas, np.arange(8, 12) / 16, atol=2e-4)


def test_callable_of_the_batch(model):
    elbo = kv.ELBO(64, schedule=lambda step: float(step), per="batch")
    np.testing.assert_allclose(batch_betas(model, elbo, False, epochs=3, initial_epoch=1), np.arange(4, 12), rtol=1e-3)


def test_batches_of_unknown_number(model):
    """A generator does not tell how many batches it has; after an epoch the callback knows."""

    model.compile("sgd", "mse")
    seen = []
    elbo = kv.ELBO(64, schedule=lambda step: seen.append(step) or 1.0, per="batch")
    stops = keras.callbacks.LambdaCallback(on_train_begin=lambda logs: elbo.params.update(steps=None))
    model.fit(X, Y, batch_size=16, epochs=2, callbacks=[stops, elbo], verbose=0)
    assert sorted(set(seen)) == list(range(8))
    with pytest.raises(ValueError, match="steps_per_epoch"):
        other = kv.ELBO(64, schedule=lambda step: 1.0, per="batch")
        stops = keras.callbacks.LambdaCallback(on_train_begin=lambda logs: other.params.update(steps=None))
        model.fit(X, Y, batch_size=16, initial_epoch=1, epochs=2, callbacks=[stops, other], verbose=0)


def test_temperature_scales_the_weight(model):
    np.testing.assert_allclose(weights_of(model, kv.ELBO(64, temperature=0.25), epochs=1), 0.25 / 64)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "jit"])
def test_free_bits_cost_their_amount_and_have_no_gradient(model, jit):
    model.compile(keras.optimizers.SGD(1.0), lambda y, prediction: 0.0 * keras.ops.sum(prediction), jit_compile=jit)
    before = [array(variable) for variable in model.trainable_variables]
    weights = sum(weight.size for weight in posteriors(model))
    fit = {"batch_size": 64, "verbose": 0}
    # 100 nats for each weight is more than any of them has
    loss = model.fit(X, Y, callbacks=[kv.ELBO(64, free_bits=100.0)], **fit).history["loss"]
    np.testing.assert_allclose(loss, 100.0 * weights / 64, rtol=1e-5)
    for variable, value in zip(model.trainable_variables, before):
        np.testing.assert_array_equal(array(variable), value)
    # a fraction of a nat is less: as if there were none
    kl = float(array(kv.kl_divergence(model)))
    loss = model.fit(X, Y, callbacks=[kv.ELBO(64, free_bits=0.01)], **fit).history["loss"]
    np.testing.assert_allclose(loss, kl / 64, rtol=1e-5)
    assert any((array(variable) != value).any() for variable, value in zip(model.trainable_variables, before))


def test_free_bits_are_those_of_kept_weights(model):
    for weight in posteriors(model):
        weight.mask.assign(np.arange(weight.size).reshape(weight.shape) % 4 == 1)
        weight.owner.free_bits = 100.0
        kept = array(weight.mask).sum()
        assert kept < weight.size
        np.testing.assert_allclose(array(weight.owner.kl_cost(weight)), 100.0 * kept, rtol=1e-6)


def test_callable_schedule(model):
    weights = weights_of(model, kv.ELBO(64, schedule=lambda epoch: epoch**2), epochs=3)
    np.testing.assert_allclose(weights, np.array([0, 1, 4]) / 64, rtol=1e-6)


@pytest.mark.slow
def test_the_loss_follows_the_weight_without_recompiling(model):
    """With a data loss of nothing the loss is the KL, by the weight of each epoch."""
    model.compile(keras.optimizers.SGD(0.0), lambda y, prediction: 0.0 * keras.ops.sum(prediction), jit_compile=True)
    history = model.fit(X, Y, epochs=3, callbacks=[kv.ELBO(64, warmup_epochs=2)], verbose=0).history
    np.testing.assert_allclose(history["loss"], np.array([0, 0.5, 1]) * history["kl"] / 64, rtol=1e-5)


def test_logs(model):
    model.layers[0].kernel.loc.regularizer._regularizer = keras.regularizers.L2(0.1)
    elbo = kv.ELBO(64)
    history = model.fit(X, Y, epochs=2, validation_data=(X, Y), callbacks=[elbo], verbose=0).history
    assert set(history) == {"loss", "val_loss", "kl", "beta", "nll", "val_nll", "elbo_loss", "val_elbo_loss"}
    np.testing.assert_allclose(history["kl"][-1], array(kv.kl_divergence(model)), rtol=1e-6)
    mse = float(((model.predict(X, verbose=0) - Y) ** 2).mean())
    np.testing.assert_allclose(history["val_nll"][-1], mse, rtol=1e-4)


EXACT = {
    "no schedule": {},
    "a KL from the second epoch on": {"start_epoch": 1, "warmup_epochs": 0},
    "a schedule per batch": {"warmup_epochs": 2, "per": "batch"},
}


@pytest.mark.slow
@pytest.mark.parametrize("jit, steps_per_execution", [(False, 1), (True, 2)], ids=["graph", "jit, two steps at once"])
@pytest.mark.parametrize("arguments", EXACT.values(), ids=EXACT)
def test_nll_is_exact(model, arguments, steps_per_execution, jit):
    """A metric of Keras's own is the measure, while the KL falls fast and the last batch is smaller."""
    if steps_per_execution > 1 and keras.backend.backend() == "torch":
        pytest.skip("Keras takes one step at a time on PyTorch")
    mse = keras.metrics.MeanSquaredError(name="exact")
    optimizer = keras.optimizers.Adam(0.05)
    model.compile(optimizer, "mse", metrics=[mse], steps_per_execution=steps_per_execution, jit_compile=jit)
    history = model.fit(
        X, Y, epochs=3, batch_size=24, callbacks=[kv.ELBO(64, **arguments)], validation_data=(X[:40], Y[:40]), verbose=0
    ).history
    np.testing.assert_allclose(history["nll"], history["exact"], rtol=1e-4)
    np.testing.assert_allclose(history["val_nll"], history["val_exact"], rtol=1e-4)


class Added(keras.layers.Layer):
    """What it adds to the loss is no likelihood."""

    def call(self, inputs):
        self.add_loss(0.3 * keras.ops.mean(keras.ops.square(inputs)))
        return inputs


def regularized(known):
    """A model with a penalty of each kind that Keras has, built before the first batch or by it."""
    l2 = keras.regularizers.L2(0.1)
    return keras.Sequential(
        [
            *[keras.Input((4,))] * known,
            keras.layers.Dense(8, "tanh", kernel_regularizer=l2, activity_regularizer=l2),
            keras.layers.ActivityRegularization(l1=0.2),
            Added(),
            kv.VariationalDense(1, kernel_regularizer=l2, bias_regularizer=l2, activity_regularizer=l2),
        ]
    )


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("known", [True, False], ids=["built", "built by the first batch"])
@pytest.mark.parametrize("arguments", EXACT.values(), ids=EXACT)
def test_nll_is_without_regularizers(arguments, known):
    """In training and in validation, with weights of examples; and the loss, at full weight or not, has them."""
    model = regularized(known)
    exact = keras.metrics.MeanSquaredError(name="exact")
    model.compile(keras.optimizers.Adam(0.05), "mse", weighted_metrics=[exact])
    weights = RNG.choice([0.5, 1.5], size=64).astype("float32")
    weights /= weights.mean()  # the loss is a mean over examples, the metric one over weights
    fit = {"batch_size": 64, "validation_batch_size": 64, "validation_data": (X, Y, weights), "verbose": 0}
    logs = model.fit(X, Y, epochs=3, sample_weight=weights, callbacks=[kv.ELBO(64, **arguments)], **fit).history
    np.testing.assert_allclose(logs["nll"], logs["exact"], rtol=1e-4)
    np.testing.assert_allclose(logs["val_nll"], logs["val_exact"], rtol=1e-4)
    penalties = np.array(logs["val_loss"]) - logs["val_nll"] - np.array(logs["kl"]) / 64
    np.testing.assert_allclose(penalties[-1], sum(array(each) for each in _regularizers(model)), rtol=1e-3)
    np.testing.assert_allclose(logs["val_elbo_loss"], logs["val_loss"], rtol=1e-4)


def _regularizers(model):
    """All but the KL, on all the data."""
    model(X)
    kl = kv.kl_divergence(model) * model.layers[-1].kl_weight
    return [*model.losses, -kl]


def test_nll_of_a_model_without_another_loss_is_what_its_layers_add():
    model = keras.Sequential([keras.Input((4,)), Added(), kv.VariationalDense(1, kernel_regularizer="l2")])
    model.compile(keras.optimizers.SGD(0.0))
    logs = model.fit(X, callbacks=[kv.ELBO(64, labels_per_example=1)], batch_size=64, verbose=0).history
    np.testing.assert_allclose(logs["nll"], 0.3 * np.square(X).mean(), rtol=1e-5)


def test_the_full_weight_is_in_the_logs_through_warmup(model):
    """`val_loss`, `val_elbo_loss` and `elbo_loss` do not depend on β: nothing moves, and β does."""
    model.compile(keras.optimizers.SGD(0.0), "mse")
    arguments = {"validation_data": (X, Y), "epochs": 4, "shuffle": False, "verbose": 0}
    history = model.fit(X, Y, callbacks=[kv.ELBO(64, start_epoch=1, warmup_epochs=2)], **arguments).history
    mse = float(((model.predict(X, verbose=0) - Y) ** 2).mean())
    full = mse + history["kl"][0] / 64
    np.testing.assert_allclose(history["val_loss"], full, rtol=1e-4)
    np.testing.assert_allclose(history["val_elbo_loss"], full, rtol=1e-4)
    kl = np.array(history["kl"]) / 64
    np.testing.assert_allclose(np.array(history["elbo_loss"]) - history["nll"], kl, rtol=1e-4)
    betas = (np.array(history["loss"]) - history["nll"]) / kl
    np.testing.assert_allclose(betas, [0, 0, 0.5, 1], atol=1e-4)
    # the layers keep the weight of the schedule
    np.testing.assert_allclose(array(model.layers[0].kl_weight), 1 / 64)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    "monitor, first", [("val_loss", True), ("val_nll", True), ("elbo_loss", True), ("elbo_loss", False)]
)
def test_callbacks_that_choose_see_it_in_any_order(model, monitor, first):
    """A model that cannot get better is left after the patience, wherever the callback stands."""
    model.compile(keras.optimizers.SGD(0.0), "mse")
    stop = keras.callbacks.EarlyStopping(monitor=monitor, mode="min", patience=1, min_delta=1.0)
    callbacks = [stop, kv.ELBO(64, warmup_epochs=0)] if first else [kv.ELBO(64, warmup_epochs=0), stop]
    history = model.fit(X, Y, validation_data=(X, Y), epochs=5, callbacks=callbacks, verbose=0)
    assert len(history.epoch) == 2


@pytest.mark.slow
def test_the_default_monitor_picks_a_model_with_a_kl(model):
    """With β = 0 the lowest loss would be that of the first epochs: the KL at full weight falls as β rises."""
    model.compile(keras.optimizers.Adam(0.02), "mse")
    stop = keras.callbacks.EarlyStopping(patience=30, restore_best_weights=True)
    elbo = kv.ELBO(64, start_epoch=4, warmup_epochs=4)
    history = model.fit(X, Y, validation_data=(X, Y), epochs=20, callbacks=[stop, elbo], verbose=0).history
    assert stop.best_epoch == int(np.argmin(history["val_elbo_loss"])) > 8


def test_stopping_within_warmup_is_said(model):
    model.compile(keras.optimizers.SGD(0.0), "mse")
    stop = keras.callbacks.EarlyStopping(patience=1)
    with pytest.warns(RuntimeWarning, match=r"β = 0.1:.*start_from_epoch=10"):
        model.fit(X, Y, validation_data=(X, Y), epochs=20, callbacks=[stop, kv.ELBO(64, warmup_epochs=10)], verbose=0)


def test_a_metric_of_the_users_keeps_its_name(model):
    mine = keras.metrics.MeanAbsoluteError(name="nll")
    model.compile("sgd", "mse", metrics=[mine])
    history = model.fit(X, Y, callbacks=[kv.ELBO(64)], verbose=0).history
    assert history["nll"][0] == pytest.approx(float(array(model.get_metrics_result()["nll"])))
    assert history["nll"][0] != pytest.approx(history["loss"][0], rel=0.01)


@pytest.mark.slow
def test_evaluate_answers_as_ever(model):
    """Within `fit`, by a callback's hand, and after it; and so does the next `fit`."""
    model.compile("sgd", "mse", metrics=["mae"])
    seen = []
    look = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(model.evaluate(X, Y, verbose=0, return_dict=True))
    )
    elbo = kv.ELBO(64)
    for callbacks in ([look, elbo], [elbo, look]):
        history = model.fit(X, Y, validation_data=(X, Y), epochs=2, callbacks=callbacks, verbose=0).history
        assert {"nll", "val_nll"} < set(history)
    seen.append(model.evaluate(X, Y, verbose=0, return_dict=True))
    assert [set(result) for result in seen] == [{"loss", "mae"}] * 5
    assert len(model.evaluate(X, Y, verbose=0)) == 2
    assert set(model.fit(X, Y, verbose=0).history) == {"loss", "mae"}
    assert {"nll", "elbo_loss"} < set(model.fit(X, Y, callbacks=[kv.ELBO(64)], verbose=0).history)


def test_checkpoints_within_fit_load(model, tmp_path):
    path = str(tmp_path / "model.keras")
    save = keras.callbacks.ModelCheckpoint(path)
    model.fit(X, Y, epochs=2, callbacks=[kv.ELBO(64), save], verbose=0)
    loaded = keras.saving.load_model(path)
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
    loaded.fit(X, Y, callbacks=[kv.ELBO(64)], verbose=0)


def test_sparsity_logger(model):
    history = model.fit(X, Y, callbacks=[kv.ELBO(64), kv.SparsityLogger()], verbose=0).history
    report = kv.sparsity(model)
    assert history["weights_left"] == [report.left / report.weights]


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_examples": 0},
        {"num_examples": -5},
        {"num_examples": float("nan")},
        {"num_examples": "many"},
        {"num_examples": 10, "warmup_epochs": -1},
        {"num_examples": 10, "start_epoch": -1},
        {"num_examples": 10, "schedule": "steep"},
        {"num_examples": 10, "per": "step"},
        {"num_examples": 10, "temperature": -1.0},
        {"num_examples": 10, "free_bits": float("inf")},
        {"num_examples": 10, "labels_per_example": 0},
        {"num_examples": 10, "likelihood_scale": -1.0},
    ],
)
def test_bad_arguments(arguments):
    name = list(arguments)[-1]
    with pytest.raises(ValueError, match=f"{name}="):
        kv.ELBO(**arguments)


def test_sparsity_logger_writes_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(6, name="first"), kv.VariationalDense(1)])
    model.compile("adam", "mse")
    logger = kv.SparsityLogger(threshold=0.0, log_dir=tmp_path)
    history = model.fit(X, Y, epochs=2, callbacks=[kv.ELBO(64), logger], verbose=0).history
    weight = model.layers[0].kernel
    log_alpha = array(weight.log_alpha())
    kv.prune(model.layers[0], threshold=float(np.median(log_alpha)))
    model.fit(X, Y, initial_epoch=2, epochs=3, callbacks=[kv.ELBO(64), logger], verbose=0)

    found = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    found.Reload()
    layer = model.layers[1].name
    scalars = {"weights_left", "weights_left/first", f"weights_left/{layer}"}
    assert set(found.Tags()["tensors"]) == scalars | {"log_alpha/first/kernel", f"log_alpha/{layer}/kernel"}
    steps = found.Tensors("weights_left")
    assert [event.step for event in steps] == [0, 1, 2]
    values = [float(stored(event)) for event in steps]
    np.testing.assert_allclose(values[:2], history["weights_left"], rtol=1e-6)
    _, second, third = (stored(event) for event in found.Tensors("log_alpha/first/kernel"))
    # Each row of a histogram is a bin: its edges and its count.
    assert second[:, 2].sum() == 24 and third[:, 2].sum() == 12
    np.testing.assert_allclose([second[0, 0], second[-1, 1]], [log_alpha.min(), log_alpha.max()], rtol=1e-5)


def stored(event):
    """Return the array of a TensorBoard event."""
    import tensorflow as tf

    return tf.make_ndarray(event.tensor_proto)


@pytest.mark.parametrize("callback", [kv.ELBO(10), kv.SparsityLogger()])
def test_a_plain_model_is_refused_before_training(callback):
    plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    plain.compile("sgd", "mse")
    before = array(plain.layers[0].kernel)
    with pytest.raises(ValueError, match="VariationalDense"):
        plain.fit(X, Y, callbacks=[callback], verbose=0)
    np.testing.assert_array_equal(before, array(plain.layers[0].kernel))


def test_a_schedule_below_zero_is_refused(model):
    with pytest.raises(ValueError, match="kl_weight"):
        model.fit(X, Y, callbacks=[kv.ELBO(10, schedule=lambda epoch: -1.0)], verbose=0)


def test_kl_divergence_is_unweighted(model):
    expected = sum(float(array(weight.kl())) for weight in posteriors(model))
    np.testing.assert_allclose(array(kv.kl_divergence(model)), expected, rtol=1e-6)
    by_layer = [float(array(kv.kl_divergence(layer))) for layer in model.layers]
    np.testing.assert_allclose(sum(by_layer), expected, rtol=1e-6)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="it is TensorFlow that traces a step twice")
def test_the_step_is_traced_once():
    class Counted(keras.layers.Layer):
        calls = 0

        def call(self, x):
            Counted.calls += 1
            return x

    model = keras.Sequential([keras.Input((4,)), Counted(), kv.VariationalDense(1)])
    model.compile("adam", "mse", jit_compile=False)
    before = Counted.calls
    model.fit(X, Y, callbacks=[kv.ELBO(64)], verbose=0)
    assert Counted.calls == before + 1


@pytest.mark.parametrize("decay", [{"weight_decay": 1e5}, {"weight_decay": None}], ids=str)
def test_optimizers_within_an_optimizer_do_not_decay_log_variances(model, decay):
    sgd = keras.optimizers.SGD(1e-6, **decay)
    model.compile(keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(sgd)), "mse")
    log_variance = model.layers[0].kernel.log_variance
    before = array(log_variance)
    model.fit(X, Y, callbacks=[kv.ELBO(64)], verbose=0)
    np.testing.assert_allclose(array(log_variance), before, rtol=1e-3)


def test_muon_does_not_decay_log_variances(model):
    model.compile(keras.optimizers.Muon(1e-6, weight_decay=None, adam_weight_decay=1e5, adam_lr_ratio=1.0), "mse")
    log_variance = model.layers[1].bias.log_variance
    before = array(log_variance)
    model.fit(X, Y, callbacks=[kv.ELBO(64)], verbose=0)
    np.testing.assert_allclose(array(log_variance), before, rtol=1e-3)


def test_nested_outputs_with_labels_per_example():
    inputs = keras.Input((4,))
    h = kv.VariationalDense(2)(inputs)
    model = keras.Model(inputs, {"a": {"x": h, "z": h + 1.0}})
    model.compile("adam", {"a": {"x": "mse", "z": "mse"}})
    y = {"a": {"x": X[:, :2], "z": X[:, :2]}}
    model.fit(X, y, verbose=0, callbacks=[kv.ELBO(64, labels_per_example=2)])
    assert float(array(model.layers[1].kl_weight)) == pytest.approx(1 / 128)


def test_a_custom_loss_that_adds_up_its_examples_is_refused(model):
    for loss in (lambda y, p: ops.sum(ops.square(y - p)), lambda y, p: -ops.sum(-ops.abs(y - p))):
        model.compile("sgd", loss)
        with pytest.raises(ValueError, match="adds up its examples"):
            model.fit(X, Y, callbacks=[kv.ELBO(64)], verbose=0)
    for loss in (lambda y, p: ops.mean(ops.square(y - p)), lambda y, p: ops.square(y - p)[:, 0]):
        model.compile("sgd", loss)
        model.fit(X, Y, callbacks=[kv.ELBO(64)], verbose=0)
        assert float(array(model.layers[0].kl_weight)) == pytest.approx(1 / 64)


@pytest.mark.parametrize(
    "loss", ["hinge", keras.losses.BinaryFocalCrossentropy(), keras.losses.Dice(), "tversky", ["hinge"]]
)
def test_a_loss_that_is_no_likelihood_is_said(model, loss):
    model.compile("sgd", loss)
    with pytest.warns(RuntimeWarning, match="is not the negative log likelihood"):
        model.fit(X, np.float32(Y > 0), callbacks=[kv.ELBO(64, labels_per_example=1)], verbose=0)


class Tagger(keras.Model):
    """A label for each step of sequences of any length; nothing but the outputs shows how long they are."""

    def __init__(self):
        super().__init__()
        self.dense = kv.VariationalDense(1)

    def call(self, x):
        return self.dense(x)


class Sequences(keras.utils.PyDataset):
    """Batches of 8 sequences of the given lengths."""

    def __init__(self, lengths):
        super().__init__()
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        steps = self.lengths[index]
        return np.ones((8, steps, 4), "float32"), np.ones((8, steps, 1), "float32")


def test_batches_of_sequences_of_different_lengths():
    for lengths, arguments in (([5, 3, 5], {}), ([5, 5, 5], {}), ([5, 3, 5], {"labels_per_example": 13 / 3})):
        model = Tagger()
        model.compile("adam", "mse", jit_compile=False)
        elbo = kv.ELBO(24, **arguments)
        if len(set(lengths)) > 1 and not arguments:
            with pytest.raises(ValueError, match="labels_per_example"):
                model.fit(Sequences(lengths), callbacks=[elbo], verbose=0, shuffle=False)
        else:
            model.fit(Sequences(lengths), validation_data=Sequences([2]), callbacks=[elbo], verbose=0, shuffle=False)
            assert float(array(model.dense.kl_weight)) == pytest.approx(1 / (24 * np.mean(lengths)))


def built_by_a_call():
    model = keras.Sequential([kv.VariationalDense(1)])
    model(np.ones((8, 10, 4), "float32"))
    return model


@pytest.mark.parametrize("make", [built_by_a_call, Tagger])
def test_each_fit_has_the_weight_of_its_own_sequences(make):
    """The model was built, and trained before, on sequences of another length."""
    model = make()
    model.compile("sgd", "mse", jit_compile=False)
    for steps in (5, 3, 3, 5):
        arguments = {"callbacks": [kv.ELBO(24, start_epoch=0, warmup_epochs=0)], "verbose": 0}
        try:
            logs = model.fit(Sequences([steps] * 3), **arguments).history
        except ValueError as error:  # TensorFlow has one function for all lengths, until it is told to make another
            assert keras.backend.backend() == "tensorflow" and "labels_per_example" in str(error)
            logs = model.fit(Sequences([steps] * 3), **arguments).history
        weight = 1 / (24 * steps)
        assert float(array(model.layers[0].kl_weight)) == pytest.approx(weight)
        # The KL in the logs is that after the epoch; the one in `elbo_loss` is a mean over its steps.
        assert logs["elbo_loss"][0] - logs["nll"][0] == pytest.approx(weight * logs["kl"][0], rel=0.05)


def test_the_schedule_starts_again_with_the_initial_weights():
    """As between the folds of a cross-validation; weights of an earlier epoch continue it."""
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(1)])
    model.compile("sgd", "mse")
    initial = model.get_weights()
    elbo = kv.ELBO(64, start_epoch=0, warmup_epochs=4)

    def betas(epochs):
        return model.fit(X, Y, epochs=epochs, callbacks=[elbo], verbose=0).history["beta"]

    assert betas(2) == [0.0, 0.25]
    earlier = model.get_weights()
    assert betas(1) == [0.5]
    model.set_weights(earlier)
    assert betas(1) == [0.75]
    for _ in range(2):
        model.set_weights(initial)
        assert betas(2) == [0.0, 0.25]
    assert betas(1) == [0.5]


class OwnMetrics(keras.Model):
    """A model whose metrics `compile` does not make."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tracker = keras.metrics.Mean("loss")

    @property
    def metrics(self):
        return [self.tracker]


def test_compile_replaces_the_step_of_a_model_with_its_own_metrics():
    inputs = keras.Input((4,))
    body = kv.VariationalDense(8)
    model = OwnMetrics(inputs, kv.VariationalDense(1)(body(inputs)))
    before = array(body.kernel.loc)
    for trainable in (False, True):
        body.trainable = trainable
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(X, Y, verbose=0, callbacks=[kv.ELBO(64)])
        assert np.array_equal(array(body.kernel.loc), before) != trainable


def test_sparsity_logger_of_a_model_without_prunable_weights():
    model = keras.Sequential([keras.Input((4,)), kv.ConcreteDropout(keras.layers.Dense(1), kl_weight=0.1)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="no weights that can be pruned"):
        model.fit(X, Y, callbacks=[kv.SparsityLogger()], verbose=0)


def own_step(with_kl):
    """Return a model with a `train_step` as in Keras's guide, for TensorFlow and PyTorch."""

    class OwnStep(keras.Model):
        def loss_of(self, x, y):
            loss = keras.ops.mean(keras.ops.square(self(x, training=True) - y))
            return loss + sum(self.losses) if with_kl else loss

        def train_step(self, data):
            x, y = data
            if keras.backend.backend() == "torch":
                self.zero_grad()
                loss = self.loss_of(x, y)
                loss.backward()
                gradients = [v.value.grad for v in self.trainable_weights]
            else:
                import tensorflow as tf

                with tf.GradientTape() as tape:
                    loss = self.loss_of(x, y)
                gradients = tape.gradient(loss, self.trainable_weights)
            self.optimizer.apply(gradients, self.trainable_weights)
            return {"loss": loss}

    inputs = keras.Input((4,))
    return OwnStep(inputs, kv.VariationalDense(1)(inputs))


def own_loss(with_kl):
    """Return a model with a `compute_loss` of its own."""

    class OwnLoss(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            loss = keras.ops.mean(keras.ops.square(y_pred - y))
            return loss + sum(self.losses) if with_kl else loss

    inputs = keras.Input((4,))
    return OwnLoss(inputs, kv.VariationalDense(1)(inputs))


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="a step on JAX computes the KL before its loss")
@pytest.mark.parametrize("with_kl", [False, True])
@pytest.mark.parametrize("make", [own_step, own_loss])
def test_a_step_without_the_kl_is_said(make, with_kl):
    model = make(with_kl)
    model.compile(keras.optimizers.SGD(0.01), "mse")
    scope = contextlib.nullcontext() if with_kl else pytest.warns(RuntimeWarning, match="does not compute the KL")
    for again in range(2):
        with warnings.catch_warnings(), scope if not again else contextlib.nullcontext():
            if with_kl or again:
                warnings.filterwarnings("error", "The training step", RuntimeWarning)
            model.fit(X, Y, callbacks=[kv.ELBO(64, labels_per_example=1)], verbose=0, epochs=2)
