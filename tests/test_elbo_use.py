"""Defaults, errors and warnings of `ELBO`, for models made and trained in different ways."""

import re
import warnings

import keras
import numpy as np
import pytest

import keras_vdrop as kv
from tests.cases import array, posteriors

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(64, 4)).astype("float32"), RNG.normal(size=(64, 1)).astype("float32")


def built(**arguments):
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(1, **arguments)])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    return model


def weight(model):
    return float(array(model.layers[-1].kl_weight))


# The schedule


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("epochs, start, warmup", [(1, 0, 0), (3, 0, 0), (4, 0, 1), (10, 1, 3), (29, 2, 8)])
def test_warmup_by_default(epochs, start, warmup):
    """About a tenth of the epochs has no KL, then β rises for three tenths. A resumed `fit` keeps that schedule."""
    seen = []
    for initial_epoch in {0, epochs // 2}:
        model, elbo = built(), kv.ELBO(64)
        note = keras.callbacks.LambdaCallback(
            on_train_batch_begin=lambda batch, logs, model=model: seen.append(weight(model) * 64)
        )
        arguments = {"initial_epoch": initial_epoch, "epochs": epochs, "batch_size": 64, "verbose": 0}
        model.fit(X, Y, callbacks=[elbo, note], **arguments)
        expected = kv.ELBO(64, start_epoch=start, warmup_epochs=warmup)
        betas = [expected.beta(epoch) for epoch in range(initial_epoch, epochs)]
        np.testing.assert_allclose(seen, betas, rtol=1e-6)
        seen.clear()


def test_a_loop_of_fits_goes_on_with_the_schedule():
    model, elbo = built(), kv.ELBO(64, start_epoch=1, warmup_epochs=2)
    betas = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first `fit` warns that it has no KL
        for _ in range(4):
            model.fit(X, Y, epochs=1, callbacks=[elbo], verbose=0)
            betas.append(weight(model) * 64)
        np.testing.assert_allclose(betas, [0, 0, 0.5, 1])
        # Another model starts the schedule again.
        other = built()
        other.fit(X, Y, epochs=1, callbacks=[elbo], verbose=0)
    assert weight(other) == 0


def test_a_fit_without_any_kl_is_said():
    with pytest.warns(RuntimeWarning, match=r"β = 0.*initial_epoch=1.*same `ELBO`.*start_epoch=0"):
        built().fit(X, Y, epochs=1, callbacks=[kv.ELBO(64, start_epoch=1, warmup_epochs=2)], verbose=0)


# The number of examples


def test_a_weight_of_one_example_is_said():
    """`kl_weight=1` is the weight for a single training example."""
    with pytest.warns(RuntimeWarning, match=r"one training example.*kl_weight=1"):
        built(kl_weight=1.0).fit(X, Y, verbose=0)
    built(kl_weight=1 / 64).fit(X, Y, verbose=0)


class Batches(keras.utils.PyDataset):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def __len__(self):
        return 64 // self.size

    def __getitem__(self, index):
        rows = slice(index * self.size, (index + 1) * self.size)
        return X[rows], Y[rows]


@pytest.mark.parametrize("examples", [3, 8], ids=["fewer than steps", "batches for examples"])
def test_a_number_of_examples_that_cannot_be_right_is_refused(examples):
    with pytest.raises(ValueError, match=rf"len\(x\).*num_examples={examples}\b"):
        built().fit(Batches(8), callbacks=[kv.ELBO(num_examples=examples)], verbose=0)


def test_batches_of_one_example_are_as_many_as_examples():
    built().fit(Batches(1), callbacks=[kv.ELBO(num_examples=len(Batches(1)))], verbose=0)


@pytest.mark.parametrize("validation", [{}, {"validation_data": (X[:8], Y[:8])}])
def test_an_epoch_of_more_examples_than_there_are_is_said(validation):
    with pytest.warns(RuntimeWarning, match=r"seen 64 examples.*num_examples=40"):
        built().fit(X, Y, callbacks=[kv.ELBO(num_examples=40)], verbose=0, **validation)


def test_an_epoch_of_fewer_examples_than_there_are_is_said():
    with pytest.warns(RuntimeWarning, match=r"seen 32 examples.*num_examples=64.*validation_split"):
        built().fit(X, Y, validation_split=0.5, callbacks=[kv.ELBO(num_examples=len(X))], verbose=0)


def test_the_kl_of_the_logs_is_that_of_the_loss():
    """The logged KL excludes frozen layers, whose KL is not in the loss."""
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(8), kv.VariationalDense(1)])
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    elbo = kv.ELBO(len(X), start_epoch=0, warmup_epochs=0, likelihood_scale=0.5**0.5)
    logs = model.fit(X, Y, batch_size=64, callbacks=[elbo], verbose=0).history
    assert logs["kl"][0] == pytest.approx(float(kv.kl_divergence(model.layers[1])), rel=1e-5)


def test_labels_for_examples_are_said():
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(2)])
    model.compile("sgd", "mse")
    with pytest.warns(RuntimeWarning, match=r"64 examples of 2 labels.*len\(x\)"):
        model.fit(X, np.tile(Y, 2), callbacks=[kv.ELBO(num_examples=128)], verbose=0)


# Models


def unbuilt(units):
    return keras.Sequential([kv.VariationalDense(8, activation="relu"), kv.VariationalDense(units)])


class Subclassed(keras.Model):
    def __init__(self, units):
        super().__init__()
        self.hidden, self.head = kv.VariationalDense(8), kv.VariationalDense(units)

    def call(self, inputs, training=False):
        return self.head(self.hidden(inputs, training=training), training=training)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("make", [unbuilt, Subclassed])
def test_a_model_that_is_built_by_its_first_batch(make):
    """Train twice, with new callbacks each time and two labels per example."""
    model = make(2)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    y = np.tile(Y, 2)
    for _ in range(2):
        callbacks = [kv.ELBO(num_examples=64), kv.SparsityLogger()]
        history = model.fit(X, y, epochs=2, validation_data=(X, y), callbacks=callbacks, verbose=0).history
        np.testing.assert_allclose(array(model.layers[-1].kl_weight), 1 / 64 / 2, rtol=1e-6)
        kl = float(array(kv.kl_divergence(model))) / 64 / 2
        np.testing.assert_allclose(history["val_loss"][-1] - history["val_nll"][-1], kl, rtol=1e-3)
        np.testing.assert_allclose(history["elbo_loss"][-1] - history["nll"][-1], kl, rtol=1e-3)
    assert model.layers[-1].get_config()["kl_weight"] is None


def test_a_layer_that_keras_does_not_find_is_said():
    """A layer called inside a `Lambda` does not learn and adds no KL: one warning names it, and only it."""
    hidden = kv.VariationalDense(8, name="hidden")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: hidden(x)), kv.VariationalDense(1)])
    model.compile("sgd", "mse")
    with pytest.warns(RuntimeWarning, match=r"'hidden' is called within .*Lambda.*does not learn.*KL") as heard:
        for _ in range(2):
            model.fit(X, Y, epochs=2, callbacks=[kv.ELBO(64)], verbose=0)
    assert len([each for each in heard if "is not one of its layers" in str(each.message)]) == 1


class Lists(keras.Model):
    """A model with layers in a list, a dict, a wrapper, a cell and an inner model, all of which Keras tracks."""

    def __init__(self):
        super().__init__()
        self.parts = [kv.VariationalDense(4), keras.Sequential([kv.VariationalDense(4)])]
        self.by_name = {"wrapped": keras.layers.TimeDistributed(kv.VariationalDense(4))}
        self.last = keras.layers.Bidirectional(keras.layers.RNN(kv.VariationalLSTMCell(2)))
        self.head = kv.VariationalDense(1)

    def call(self, inputs, training=False):
        for part in self.parts:
            inputs = part(inputs, training=training)
        steps = keras.ops.reshape(inputs, (-1, 2, 2))
        steps = self.by_name["wrapped"](steps, training=training)
        return self.head(self.last(steps, training=training), training=training)


@pytest.mark.slow
def test_nothing_is_said_of_layers_that_keras_finds():
    model = Lists()
    model.compile("sgd", "mse")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not one of its layers")
        model.fit(X, Y, callbacks=[kv.ELBO(64)], verbose=0)


class OwnLoss(Subclassed):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return super().compute_loss(x, y, y_pred, sample_weight) + 1.0


class OwnMetrics(OwnLoss):
    """A model that overrides `compute_metrics` without the metrics of the model, as in Keras's guides."""

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return {"mine": keras.ops.mean(y_pred)}


@pytest.mark.slow
def test_a_loss_of_ones_own():
    model = OwnLoss(1)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    history = model.fit(X, Y, callbacks=[kv.ELBO(64)], validation_data=(X, Y), verbose=0).history
    mse = float(((model.predict(X, verbose=0) - Y) ** 2).mean())
    np.testing.assert_allclose(history["val_nll"], mse + 1.0, rtol=1e-4)


def test_logs_of_ones_own():
    model = OwnMetrics(1)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    history = model.fit(X, Y, callbacks=[kv.ELBO(64)], verbose=0).history
    assert set(history) == {"mine", "kl", "beta"}
    assert weight(model) == pytest.approx(1 / 64)


def test_without_a_loss_the_labels_are_asked_for():
    model = OwnLoss(1)
    model.compile(keras.optimizers.SGD(0.0))
    with pytest.raises(ValueError, match="labels_per_example"):
        model.fit(X, Y, callbacks=[kv.ELBO(64)], verbose=0)
    model.fit(X, Y, callbacks=[kv.ELBO(64, labels_per_example=2)], verbose=0)
    assert weight(model) == pytest.approx(1 / 128)


# What the user has set


def test_a_layers_own_weight_is_not_replaced_without_a_word():
    model = built(kl_weight=0.25, name="mine")
    elbo = kv.ELBO(64)
    with pytest.warns(RuntimeWarning, match=r"0.0156 in place of the 0.25 .*'mine'"):
        model.fit(X, Y, callbacks=[elbo], verbose=0)
    assert weight(model) == 1 / 64
    model.fit(X, Y, callbacks=[elbo], verbose=0)  # no second warning
    built(kl_weight=1 / 64).fit(X, Y, callbacks=[kv.ELBO(64)], verbose=0)  # no warning for an equal weight


def decayed(optimizer, make=built, **arguments):
    """Return the mean ratio new/old of the log variance, mean and bias after training with weight decay."""
    model = make(use_bias=True, kernel_prior="ard", **arguments) if make is built else make(1)
    model.compile(optimizer, "mse")
    if not model.built:
        model(X)
    layer = model.layers[-1]
    layer.kl_weight = 0.0
    layer.bias.assign(array(layer.bias) + 1.0)
    values = [array(layer.kernel.log_variance), array(layer.kernel.loc), array(layer.bias)]
    model.fit(X, Y, callbacks=[kv.ELBO(64, temperature=0.0)], verbose=0)
    after = [array(layer.kernel.log_variance), array(layer.kernel.loc), array(layer.bias)]
    return [float(np.mean(new / old)) for new, old in zip(after, values)]


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "LossScaleOptimizer"])
@pytest.mark.parametrize("make", [built, unbuilt])
def test_weight_decay_leaves_log_variances(make, scaled):
    optimizer = keras.optimizers.SGD(1e-6, weight_decay=1e5)  # decays by 0.1 per step; gradient steps are negligible
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1.0)
    log_variance, loc, bias = decayed(optimizer, make)
    assert log_variance == pytest.approx(1.0, abs=1e-3)
    assert loc == pytest.approx(0.9**2, abs=1e-3)
    assert bias == pytest.approx(1.0, abs=1e-3)  # the user's own exclusion still holds


# Warnings at the end of training


def line(prior="normal", start=-40.0, known=True):
    """Return a regression model with the parameters of a normal distribution as outputs and little initial noise."""
    arguments = {"kernel_prior": prior, "initial_log_variance": start}
    parts = [kv.VariationalDense(20, "relu", **arguments), kv.VariationalDense(2, **arguments)]
    return keras.Sequential([*[keras.Input((4,))] * known, *parts])


TARGET = X @ np.float32([[1.0], [-1.0], [0.5], [0.0]]) + 0.1 * Y


def learn(model, rate, fits=1, epochs=1, copies=1, batch_size=1, steps_per_execution=1, **arguments):
    """Call `fit` `fits` times with one callback and return its messages about the posterior and the KL."""
    optimizer = keras.optimizers.Adam(rate, **arguments)
    model.compile(optimizer, kv.losses.NormalNLL(), steps_per_execution=steps_per_execution)
    elbo = kv.ELBO(64 * copies, start_epoch=0, warmup_epochs=0)
    x, y = np.tile(X, (copies, 1)), np.tile(TARGET, (copies, 1))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(fits):
            model.fit(x, y, batch_size=batch_size, epochs=epochs, callbacks=[elbo], verbose=0)
    return [str(each.message) for each in heard if "KL/num_examples" in str(each.message)]


STAYS = r"hardly moved.*KL/num_examples is .* NLL of .*learning rate"


@pytest.mark.slow
@pytest.mark.parametrize("known", [True, False], ids=["built", "built by the first batch"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"epochs": 1, "copies": 4},
        {"epochs": 2},
        {"epochs": 40, "batch_size": 32},
        {"fits": 6},
        {"fits": 110, "batch_size": 32},
    ],
    ids=["one epoch", "two", "forty of two steps", "a loop", "a loop of two steps"],
)
def test_a_posterior_that_stays_is_said(arguments, known):
    """There is one warning, however the steps are divided into epochs and calls of `fit`."""
    (message,) = learn(line(known=known), 1e-4, **arguments)
    assert re.search(STAYS, message)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    "arguments",
    [
        {"epochs": 20, "batch_size": 32},
        {"fits": 3},
        {"epochs": 4, "gradient_accumulation_steps": 8},
        {"epochs": 20, "batch_size": 32, "steps_per_execution": 20},
    ],
    ids=["forty steps", "few of a loop", "gathered gradients", "fewer than a call could have"],
)
def test_nothing_is_said_of_few_steps(arguments):
    if "steps_per_execution" in arguments and keras.backend.backend() == "torch":
        pytest.skip("Keras takes one step at a time in PyTorch.")
    assert learn(line(), 1e-4, **arguments) == []


@pytest.mark.slow
def test_nothing_is_said_of_a_posterior_that_has_arrived():
    model = line("log_uniform", start=-10.0)
    learn(model, 0.03, epochs=150, batch_size=32)
    assert learn(model, 1e-3, epochs=5) == []


def test_a_kl_that_dwarfs_the_data_is_said_without_a_trend():
    """The posterior has moved from its start, but not in this training, so no trend shows."""
    model = line()
    for weight in posteriors(model):
        weight.log_variance.assign(RNG.uniform(-80.0, -70.0, size=weight.shape))
    (message,) = learn(model, 0.0, epochs=2)
    assert "KL dwarfs the NLL" in message


@pytest.mark.slow
def test_another_training_between_begins_a_new_course():
    """Log variances that changed between two calls of `fit` do not count as moved by the callback's steps."""
    model, elbo = line(), kv.ELBO(64, start_epoch=0, warmup_epochs=0)
    model.compile(keras.optimizers.Adam(1e-4), kv.losses.NormalNLL())
    fit = {"batch_size": 2, "epochs": 1, "callbacks": [elbo], "verbose": 0}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*KL/num_examples")
        for _ in range(10):
            model.fit(X, TARGET, **fit)
            for weight in posteriors(model):
                weight.log_variance.assign_add(0.01 * np.ones(weight.shape))


@pytest.mark.slow
def test_a_collapse_is_said():
    """With a KL 1000 times too large, no weight is kept."""
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(1, name="gone", threshold=0.0)])
    model.compile(keras.optimizers.Adam(0.3), "mse")
    elbo = kv.ELBO(64, start_epoch=10, warmup_epochs=5, temperature=1000.0)
    with pytest.warns(RuntimeWarning, match=r"collapsed.*'gone'.*temperature"):
        model.fit(X, X @ np.float32([[1.0], [-1.0], [0.5], [0.0]]), epochs=40, callbacks=[elbo], verbose=0)
