"""Does the posterior converge in a training run of usual length? The current default arguments against earlier ones.

    python benchmarks/arrival.py --topics regression digits --seeds 5 --out benchmarks/results/arrival_small.json
    python benchmarks/arrival.py --topics mnist pruning --data DIR --out benchmarks/results/arrival_images.json

"fixed" passes the earlier defaults: log variances start at −10, one Adam step moves them by about the learning rate
(`log_variance_rate=1`), and the "normal" prior is N(0, 1). "default" passes only the prior. The topics are:

- regression: 300 rows of a noisy sine on two separate intervals; a 1-50-50-2 network; 600 steps at a learning rate of
  1e-3, and 2,000 steps at 1e-2. Reported are the KL per row and the epistemic standard deviation at the data (the
  greater of two points), between the intervals and beyond them. In a third run, after 600 steps at 1e-3, the log
  variances train alone for another 4,000 steps, which shows their optimum for the means found by then.
- digits: the first 1,400 of scikit-learn's digits, a small convolutional network, 25 epochs at 3e-3. Reported is the
  accuracy on the remaining digits.
- mnist: a 784-300-100-10 network, 8 epochs, batches of 128, Adam's rate falling linearly from 1e-3 to 0. The KL sets in
  with the second epoch and has its full weight three epochs later. Reported are the negative ELBO of all 60,000 images
  in nats per image (20 draws, exact KL) and its two parts; the test error of the posterior mean, and the test NLL of
  the mean of 20 draws; the pruning ratio and the test error after `prune`.
- pruning: the same with 20 epochs at 3e-3.

DIR holds mnist.npz.
"""

import functools

import common
import images
import keras
import numpy as np
from keras import layers, ops

import keras_vdrop as kv
from keras_vdrop.functional import kl

# Learning rate and number of epochs; an epoch has ten steps.
REGRESSION = {
    "600 steps": (1e-3, 60),
    "600 steps and the log variances' optimum": (1e-3, 60),
    "2000 steps": (1e-2, 200),
}
TOPICS = {
    "regression": tuple(REGRESSION),
    "digits": ("log_uniform", "plain"),
    "mnist": ("log_uniform", "ard", "normal"),
    "pruning": ("log_uniform", "ard"),
}
FIXED = {"initial_log_variance": -10.0, "log_variance_rate": 1.0}


def arguments_of(prior, defaults):
    """Return the arguments of a variational layer with that prior: the current defaults, or the earlier ones."""
    if defaults == "default":
        return {"kernel_prior": prior}
    return {"kernel_prior": kv.priors.Normal(1.0) if prior == "normal" else prior, "bias_prior": None, **FIXED}


def draws(model, x, options, seed=0):
    """Return log probabilities of the classes under each draw, (rows, draws, classes)."""
    count = 2 if options.quick else 20
    logits = kv.MonteCarlo(model, count, output="samples", seed=seed).predict(x, batch_size=1000, verbose=0)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def exact_kl(model):
    """Return the KL in nats; to the log-uniform prior it is exact, without the approximation used in training."""
    total = 0.0
    for weight in kv.posterior.posteriors(model):
        if isinstance(weight.prior, kv.priors.LogUniform):
            total += float(ops.sum(kl.log_uniform_exact(weight.loc.value, weight.log_variance.value)))
        else:
            total += float(weight.kl())
    return total


def learn_images(prior, defaults, data, options, rate=1e-3, epochs=8):
    epochs = 2 if options.quick else epochs
    (x, y), (x_test, y_test) = data["train"], data["test"]
    dense = functools.partial(kv.VariationalDense, **arguments_of(prior, defaults))
    hidden = (dense(units, activation="relu") for units in (300, 100))
    model = keras.Sequential([keras.Input((28, 28, 1)), layers.Flatten(), *hidden, dense(10)])
    steps = epochs * -(-len(x) // 128)
    adam = keras.optimizers.Adam(keras.optimizers.schedules.PolynomialDecay(rate, steps, 0.0))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(adam, loss, steps_per_execution=20)
    elbo = kv.ELBO(len(x), start_epoch=min(1, epochs - 1), warmup_epochs=min(3, epochs - 1))
    model.fit(x, y, batch_size=128, epochs=epochs, callbacks=[elbo], verbose=0)

    def error():
        return 100 * float(np.mean(model.predict(x_test, batch_size=1000, verbose=0).argmax(-1) != y_test))

    nll = -float(np.take_along_axis(draws(model, x, options), y[:, None, None], axis=-1).mean())
    mean = np.logaddexp.reduce(draws(model, x_test, options), axis=1) - np.log(2 if options.quick else 20)
    result = {
        "negative_elbo": nll + exact_kl(model) / len(x),
        "nll": nll,
        "kl": exact_kl(model) / len(x),
        "error": error(),
        "test_nll": -float(np.take_along_axis(mean, y_test[:, None], axis=-1).mean()),
    }
    ratio = kv.prune(model).ratio
    return {**result, "ratio": ratio, "pruned_error": error()}


def sine(rng, rows=300):
    """Draw a noisy sine on two separate intervals: x and y, each (rows, 1)."""
    half = rows // 2
    x = np.concatenate([rng.uniform(-4, -1, half), rng.uniform(1, 4, half)])[:, None].astype("float32")
    return x, (np.sin(x) + 0.1 * rng.normal(size=x.shape)).astype("float32")


def sine_network(dense):
    return keras.Sequential([keras.Input((1,)), *(dense(50, activation="relu") for _ in range(2)), dense(2)])


def fit_log_variances(model, x, y, epochs):
    """Freeze the means and train the log variances alone, at the full KL weight after the first epoch."""
    for weight in kv.posterior.posteriors(model):
        weight.loc.trainable = False
    steps = epochs * -(-len(x) // 32)
    rate = keras.optimizers.schedules.PolynomialDecay(1e-2, steps, 0.0)
    model.compile(keras.optimizers.Adam(rate), kv.losses.NormalNLL(), steps_per_execution=10)
    elbo = kv.ELBO(len(x), start_epoch=0, warmup_epochs=1)
    model.fit(x, y, epochs=epochs, batch_size=32, callbacks=[elbo], verbose=0)


def learn_regression(length, defaults, seed, options):
    rate, epochs = REGRESSION[length]
    epochs = 4 if options.quick else epochs
    x, y = sine(np.random.default_rng(seed))
    arguments = arguments_of("normal", defaults)
    model = sine_network(
        functools.partial(kv.VariationalDense, **{**arguments, "bias_prior": arguments["kernel_prior"]})
    )
    model.compile(keras.optimizers.Adam(rate), kv.losses.NormalNLL(), steps_per_execution=10)
    elbo = kv.ELBO(len(x), warmup_epochs=epochs // 4)
    model.fit(x, y, epochs=epochs, batch_size=32, callbacks=[elbo], verbose=0)
    if length.endswith("optimum"):
        fit_log_variances(model, x, y, 4 if options.quick else 400)
    points = np.float32([[0.0], [-2.5], [2.5], [6.0]])
    predicted = kv.MonteCarlo(model, 200, "normal", seed=0).predict(points, verbose=0)
    between, left, right, beyond = np.sqrt(np.ravel(predicted["epistemic_variance"])).tolist()
    at = max(left, right)
    return {"kl": exact_kl(model) / len(x), "at": at, "between": between, "beyond": beyond, "times": beyond / at}


def digits():
    """Return scikit-learn's digits: images (1797, 8, 8, 1) in [0, 1], and labels."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return x.reshape(-1, 8, 8, 1).astype("float32") / 16, y


def digits_network(convolution, dense):
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            convolution(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            dense(128, activation="relu"),
            dense(10),
        ]
    )


def learn_digits(prior, defaults, options):
    x, y = digits()
    if prior == "plain":
        dense, convolution = layers.Dense, layers.Conv2D
    else:
        arguments = arguments_of(prior, defaults)
        dense, convolution = (functools.partial(c, **arguments) for c in (kv.VariationalDense, kv.VariationalConv2D))
    model = digits_network(convolution, dense)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss, steps_per_execution=11)
    epochs = 3 if options.quick else 25
    elbo = [] if prior == "plain" else [kv.ELBO(1400, start_epoch=min(2, epochs - 1), warmup_epochs=min(8, epochs))]
    model.fit(x[:1400], y[:1400], batch_size=32, epochs=epochs, callbacks=elbo, verbose=0)
    right = model.predict(x[1400:], verbose=0).argmax(-1) == y[1400:]
    return {"accuracy": 100 * float(np.mean(right))}


def learn(name, seed, data, options):
    """Train and score one network with one seed; `name` is "topic, prior or run, defaults"."""
    keras.utils.set_random_seed(seed)
    topic, what, defaults = name.split(", ")
    if topic == "digits":
        return learn_digits(what, defaults, options)
    if topic == "regression":
        return learn_regression(what, defaults, seed, options)
    rate, epochs = (3e-3, 20) if topic == "pruning" else (1e-3, 8)
    return learn_images(what, defaults, data, options, rate, epochs)


def show(rows):
    for topic in TOPICS:
        ours = {name: each for name, each in rows.items() if name.startswith(topic) and each}
        if not ours:
            continue
        columns = [key for key in next(iter(ours.values()))[0] if key != "seed"]
        print(f"\n{topic:<40}" + "".join(f"{column:>18}" for column in columns))
        for name, each in ours.items():
            cells = "".join(f"{common.spread([row[column] for row in each]):>18}" for column in columns)
            print(f"{name.partition(', ')[2]:<40}{cells}")


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--topics", nargs="+", choices=[*TOPICS], default=[*TOPICS])
    options = parser.parse_args()
    if options.quick:
        options.seeds = 1
    needs_images = {"mnist", "pruning"} & set(options.topics)
    data = images.load(options.data, None if options.quick else "mnist") if needs_images else None
    names = [
        f"{topic}, {what}, {defaults}"
        for topic in options.topics
        for what in TOPICS[topic]
        for defaults in (("default",) if what == "plain" else ("fixed", "default"))
    ]
    show(common.learn_rows(names, options, functools.partial(learn, data=data, options=options)))


if __name__ == "__main__":
    main()
