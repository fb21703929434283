"""Compare the estimators of the noise, in training and in prediction, by a common measure.

    python benchmarks/estimators.py --data DIR --out benchmarks/results/estimators.json
    python benchmarks/estimators.py --topics time --repeats 15 --data DIR --out benchmarks/results/estimators.json

There are four problems: LeNet-5 on MNIST and on Fashion-MNIST; the Transformer of text_transformer.py; and, on
synthetic data, a convolutional network that averages over all positions before it predicts one number. Each network
trains with each estimator, under each prior. Each trained network then predicts in four ways:

- as learned: by the estimator of its training;
- flipout;
- whole weights: every weight is drawn once for all rows (`MonteCarlo(consistent=True)`). This samples the posterior
  itself and is the reference;
- means: the posterior mean, without noise.

The negative ELBO is computed in the same way for all: the NLL of the training data expected over draws of whole
weights, plus KL / N. Its only error is that of the number of draws. The table serves to choose an estimator, so its
scores use no test data: they come from the first `--judged` of the last 10,000 training images, and from validation
sentences. For the AUROC, the out-of-distribution images are those of the other image data set.

Networks with the log-uniform prior are finally pruned at the default threshold. For networks trained with "auto", the
benchmark also measures how much each estimator's noise makes the gradient of one batch vary, as a ratio of variances to
that of local reparameterization.

`--topics time` measures the time of a training step, alternating with that of Keras's own layers, and writes it to a
second file beside that of --out (`..._time.json`). Run it while the machine is otherwise idle.

DIR holds mnist.npz, fashion_mnist.npz and rt-polarity/, as for ood.py and text_transformer.py.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable

import common
import images
import keras
import mnist_lenet
import numpy as np
import text
import text_transformer
from keras import layers, ops

import keras_vdrop as kv
from keras_vdrop.functional import estimators, uncertainty
from keras_vdrop.posterior import posteriors
from keras_vdrop.scores import calibration, detection, regression

ESTIMATORS = (*estimators.ESTIMATORS, "auto")
PRIORS = ("log_uniform", "normal")

# The title of each score, and the number of digits shown. `spread` measures how much the draws differ: the mean mutual
# information in nats, or in regression the epistemic standard deviation (root mean square over the examples).
SCORES = {
    "error": ("error %", 2),
    "rmse": ("RMSE", 3),
    "nll": ("NLL", 4),
    "ece": ("ECE %", 2),
    "coverage": ("90 % covers %", 1),
    "spread": ("spread", 4),
    "auroc": ("AUROC", 4),
}
# The error measures of classification and of regression.
WRONG = ("error", "rmse")


# Likelihoods: from the network's outputs under each draw, (N, S, ...), to scores


class Classes:
    """Classification: one logit per class, or a single logit for the second of two classes."""

    def __init__(self, loss):
        self.loss = loss

    def log_probability(self, samples):
        """Return the log probabilities of the C classes, (N, S, C)."""
        if samples.shape[-1] == 1:
            samples = np.concatenate([np.zeros_like(samples), samples], axis=-1)
        return samples - np.logaddexp.reduce(samples, axis=-1, keepdims=True)

    def nll(self, samples, y):
        """Return the NLL averaged over the draws, as in the ELBO."""
        labels = y.reshape(-1, 1, 1).astype("int64")
        return -float(np.take_along_axis(self.log_probability(samples), labels, axis=-1).mean())

    def scores(self, samples, y, other=None):
        y = y.ravel().astype("int64")
        inside = self._statistics(samples)
        probability = inside["probability"]
        scores = {
            "error": 100 * (1 - calibration.accuracy(probability, y)),
            "nll": calibration.negative_log_likelihood(probability, y),
            "ece": 100 * calibration.expected_calibration_error(probability, y),
            "spread": float(inside["mutual_information"].mean()),
        }
        if other is not None:
            outside = self._statistics(other)
            scores["auroc"] = detection.auroc(inside["predictive_entropy"], outside["predictive_entropy"])
        return scores

    def _statistics(self, samples):
        probability = np.exp(self.log_probability(samples)).swapaxes(0, 1)
        return {key: ops.convert_to_numpy(value) for key, value in uncertainty.categorical(probability).items()}


class Numbers:
    """Regression: the outputs are the mean of a normal distribution and its raw scale."""

    def __init__(self):
        self.loss = kv.losses.NormalNLL

    def _parameters(self, samples):
        """Return the mean and the standard deviation under each draw, each (N, S)."""
        samples = samples.astype("float64")
        return samples[..., 0], np.logaddexp(0.0, samples[..., 1]) + 1e-3

    def nll(self, samples, y):
        loc, scale = self._parameters(samples)
        return float(np.mean(0.5 * np.log(2 * np.pi) + np.log(scale) + 0.5 * ((y[:, None] - loc) / scale) ** 2))

    def scores(self, samples, y, other=None):
        loc, scale = self._parameters(samples)
        mean, deviation = loc.mean(1), np.sqrt((scale**2).mean(1) + loc.var(1))
        return {
            "rmse": float(np.sqrt(np.mean((mean - y) ** 2))),
            "nll": regression.normal_negative_log_likelihood(mean, deviation, y),
            "coverage": 100 * regression.interval_coverage(*regression.normal_interval(mean, deviation, 0.9), y),
            "spread": float(np.sqrt(loc.var(1).mean())),
        }


# Problems


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network, its data and its training settings.

    Attributes:
        network: Function `make -> model`, where `make` maps a variational layer class to a layer factory.
        data: {"train": (x, y), "test": (x, y)}, and optionally "other": x for out-of-distribution detection.
        likelihood: `Classes` or `Numbers`.
        epochs, batch, rate: Number of epochs, rows per step, and Adam's initial rate, which falls linearly to 0.
        start_epoch, warmup_epochs: The schedule of the KL, as in `kv.ELBO`.
    """

    network: Callable
    data: dict
    likelihood: Classes | Numbers
    epochs: int
    batch: int = 100
    rate: float = 3e-3
    start_epoch: int = 1
    warmup_epochs: int = 3

    @property
    def train(self):
        return self.data["train"]


def lenet(name, options):
    data = images.load(options.data, None if options.quick else name, validation=not options.quick)
    other = images.load(options.data, None if options.quick else _OTHER[name])["test"][0]
    data = {
        "train": tuple(each[: options.examples] for each in data["train"]),
        "test": tuple(each[: options.judged] for each in data["test"]),
        "other": other[: options.judged // 3],
    }

    def network(make):
        return mnist_lenet.network("5-caffe", make(kv.VariationalDense), make(kv.VariationalConv2D))

    categorical = functools.partial(keras.losses.SparseCategoricalCrossentropy, from_logits=True)
    return Problem(network, data, Classes(categorical), options.epochs)


_OTHER = {"mnist": "fashion_mnist", "fashion_mnist": "mnist"}


def transformer(options):
    data, size = text.load(options)

    def network(make):
        classes = kv.VariationalEmbedding, kv.VariationalMultiHeadAttention, kv.VariationalDense
        return text_transformer.classifier(*map(make, classes), size)

    binary = functools.partial(keras.losses.BinaryCrossentropy, from_logits=True)
    parts = {"train": data["train"], "test": data["validation"]}
    return Problem(network, parts, Classes(binary), options.epochs, batch=text.BATCH)


def pooled(options, examples=400, side=20):
    """Make images of noise, and y: the mean |sum| of vertically adjacent pixels, standardised, plus noise."""
    rng = np.random.default_rng(0)
    size = 60 if options.quick else examples
    x = rng.normal(size=(size + 1000, side, side, 1)).astype("float32")
    y = np.abs(x[:, :-1] + x[:, 1:]).mean((1, 2, 3))
    y = ((y - y.mean()) / y.std() + 0.2 * rng.normal(size=len(y))).astype("float32")
    data = {"train": (x[:size], y[:size]), "test": (x[size:], y[size:])}

    def network(make):
        convolution, dense = make(kv.VariationalConv2D), make(kv.VariationalDense)
        return keras.Sequential(
            [
                keras.Input((side, side, 1)),
                convolution(8, 3, activation="relu", name="convolution1"),
                convolution(8, 3, activation="relu", name="convolution2"),
                layers.GlobalAveragePooling2D(),
                dense(2, name="outputs"),
            ]
        )

    epochs = options.epochs if options.quick else 60
    return Problem(network, data, Numbers(), epochs, batch=50, rate=1e-2, start_epoch=0, warmup_epochs=20)


PROBLEMS = {
    "LeNet-5, MNIST": functools.partial(lenet, "mnist"),
    "LeNet-5, Fashion-MNIST": functools.partial(lenet, "fashion_mnist"),
    "Transformer": transformer,
    "pooled CNN": pooled,
}


def keras_layer(cls):
    """Return the Keras class that a variational class derives from."""
    return next(base for base in cls.__mro__ if base.__module__.split(".")[0] == "keras")


def variational(**arguments):
    """Return a function from a variational class to a factory of its layers with these arguments."""
    return lambda cls: functools.partial(cls, **arguments)


def made(problem, estimator, prior, **arguments):
    return problem.network(variational(estimator=estimator, kernel_prior=prior, **arguments))


def redrawn(problem, model, estimator, prior):
    """Copy the posterior into a network with another estimator."""
    same = made(problem, estimator, prior, kl_weight=1.0)
    same.set_weights(model.get_weights())
    return same


# Training and scoring


def fit(model, problem, callbacks=()):
    x, y = problem.train
    steps = problem.epochs * -(-len(x) // problem.batch)
    rate = keras.optimizers.schedules.PolynomialDecay(problem.rate, steps, 0.0)
    # Run 20 steps per call: on few cores, TensorFlow's steps otherwise wait for its input pipeline.
    model.compile(keras.optimizers.Adam(rate), problem.likelihood.loss(), steps_per_execution=20)
    model.fit(x, y, batch_size=problem.batch, epochs=problem.epochs, callbacks=list(callbacks), verbose=0)


def drawing(model, draws, consistent=False):
    """Return a function from inputs to the outputs under each draw, (N, S, ...)."""
    sampler = kv.MonteCarlo(model, draws, output="samples", seed=0, consistent=consistent)
    return functools.partial(sampler.predict, batch_size=500, verbose=0)


def without_noise(model):
    """Return a function from inputs to the outputs at the posterior mean, (N, 1, ...)."""
    return lambda x: model.predict(x, batch_size=500, verbose=0)[:, None]


def predictors(problem, model, estimator, prior, draws):
    """Return {way of prediction: function from inputs to samples}."""
    as_learned = drawing(model, draws)
    by_flipout = redrawn(problem, model, "flipout", prior)
    return {
        "as learned": as_learned,
        "flipout": as_learned if estimator == "flipout" else drawing(by_flipout, draws),
        "whole weights": drawing(model, draws, consistent=True),
        "means": without_noise(model),
    }


def scores(problem, predict):
    """Score `predict`, a function from inputs to samples, on the test part of the problem's data."""
    x, y = problem.data["test"]
    other = predict(problem.data["other"]) if "other" in problem.data else None
    return problem.likelihood.scores(predict(x), y, other)


def negative_elbo(problem, model, predict):
    x, y = problem.train
    nll = problem.likelihood.nll(predict(x), y)
    kl = float(kv.kl_divergence(model)) / len(x)
    return {"negative_elbo": nll + kl, "train_nll": nll, "kl": kl}


def pruned(problem, model):
    """Prune; return the ratio of all weights to the kept ones, and the error of the pruned network's mean."""
    report = kv.prune(model)
    left = scores(problem, without_noise(model))
    return {"ratio": report.weights / max(report.left, 1), **{key: left[key] for key in WRONG if key in left}}


def learn(name, seed, problems, options):
    """Train and score one network with one seed; `name` is "problem; prior; estimator"."""
    title, prior, estimator = name.split("; ")
    problem = problems(title)
    keras.utils.set_random_seed(seed)
    if estimator == "keras.layers":
        model = problem.network(keras_layer)
        fit(model, problem)
        return {"drawn": {"means": scores(problem, without_noise(model))}}
    model = made(problem, estimator, prior)
    fit(model, problem, [kv.ELBO(len(problem.train[0]), problem.warmup_epochs, problem.start_epoch)])
    predict = predictors(problem, model, estimator, prior, options.draws)
    row = {
        **negative_elbo(problem, model, predict["whole weights"]),
        "drawn": {way: scores(problem, of) for way, of in predict.items()},
    }
    if estimator == "auto":
        row["gradient"] = gradient_variances(problem, model, prior, options.gradients)
    if prior == "log_uniform":
        row["pruned"] = pruned(problem, model)
    return row


# The variance of the gradient

# The gradient is read from the change of the weights in one step. With a rate this high, rounding is negligible.
_RATE = 1e3


def gradient_variances(problem, model, prior, draws):
    """Return {estimator: {weight: [of loc, of log_variance]}}, as ratios to those of local reparameterization."""
    variances = {}
    for estimator in ESTIMATORS:
        same = redrawn(problem, model, estimator, prior)
        same.compile(keras.optimizers.SGD(_RATE), problem.likelihood.loss())
        variances[estimator] = _gradient_variances(same, *(each[: problem.batch] for each in problem.train), draws)
    base = variances["local_reparameterization"]
    return {
        estimator: {weight: [float(v / b) for v, b in zip(each, base[weight])] for weight, each in of.items()}
        for estimator, of in variances.items()
    }


def _gradient_variances(model, x, y, draws):
    """Return {weight: (of loc, of log_variance)}: the gradient's variance between draws for one batch.

    The variance is summed over the elements of the weight. It is that of the weights after one SGD step from the same
    start, which works on every backend; the constant factor cancels in the ratios.
    """
    weights = {
        weight.loc.path.removeprefix(f"{model.name}/").removesuffix("_loc"): (weight.loc, weight.log_variance.variable)
        for weight in posteriors(model)
    }
    start = [variable.numpy() for variable in model.trainable_variables]
    gradients = []
    for _ in range(draws):
        for variable, value in zip(model.trainable_variables, start):
            variable.assign(value)
        model.train_on_batch(x, y)
        gradients.append([variable.numpy() for pair in weights.values() for variable in pair])
    flat = [float(np.var(np.stack(each), axis=0, ddof=1).sum()) for each in zip(*gradients)]
    return dict(zip(weights, zip(flat[::2], flat[1::2])))


# Time


def step(problem, model, jit):
    """Compile the model; return a function without arguments that runs one training step."""
    model.compile(keras.optimizers.Adam(1e-3), problem.likelihood.loss(), jit_compile=jit)
    x, y = (ops.convert_to_tensor(each[: problem.batch]) for each in problem.train)
    return lambda: model.train_on_batch(x, y)


def times(problems, options):
    """Return {title: {name: {"ms", "ratio"}}}: medians, the ratio relative to Keras's own layers."""
    result = {}
    for title in options.problems:
        if title == "LeNet-5, Fashion-MNIST":
            continue  # same network as for MNIST
        problem = problems(title)
        for jit in (False, True) if keras.backend.backend() == "tensorflow" else (True,):
            models = {"keras.layers": problem.network(keras_layer)}
            models.update({name: made(problem, name, "log_uniform", kl_weight=1e-4) for name in options.estimators})
            steps = {name: step(problem, model, jit) for name, model in models.items()}
            seconds = common.measure(steps, options.repeats, warm=True)
            base = seconds["keras.layers"]
            rows = {
                name: {"ms": 1e3 * float(np.median(each)), "ratio": float(np.median(each / base))}
                for name, each in seconds.items()
            }
            result[f"{title}, {keras.backend.backend()}, jit_compile={jit}"] = rows
            print(f"\n{title}, jit_compile={jit}")
            for name, row in rows.items():
                print(f"{name:<28}{row['ms']:>10.1f} ms{row['ratio']:>8.2f}", flush=True)
    return result


# Results


def names(options):
    """Return the names of the networks, grouped by prior."""
    result = {}  # an ordered set
    for prior in options.priors:
        for title in options.problems:
            result[f"{title}; none; keras.layers"] = None
            result.update({f"{title}; {prior}; {estimator}": None for estimator in options.estimators})
    return list(result)


def show(rows):
    for name, each in rows.items():
        if each:
            print(f"\n{name}: {_figures(each)}")
            for way in each[0]["drawn"]:
                scores = [row["drawn"][way] for row in each]
                print(f"  {way:<16}" + "".join(f"{_cell(scores, key):>32}" for key in SCORES if key in scores[0]))
            if "gradient" in each[0]:
                _show_gradients([row["gradient"] for row in each])


def _figures(rows):
    keys = [key for key in ("negative_elbo", "train_nll", "kl") if key in rows[0]]
    figures = [f"{key} {_mean(rows, key):.4f}" for key in keys]
    if "pruned" in rows[0]:
        of = [row["pruned"] for row in rows]
        (wrong,) = (key for key in WRONG if key in of[0])
        figures.append(f"pruned {_mean(of, 'ratio'):.1f}x at {_cell(of, wrong)}")
    return ", ".join(figures)


def _mean(rows, key):
    return np.mean([row[key] for row in rows])


def _cell(rows, key):
    title, digits = SCORES[key]
    values = [row[key] for row in rows]
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{title} {np.mean(values):.{digits}f}{deviation}"


def _show_gradients(rows):
    for weight in rows[0]["auto"]:
        ratios = {name: np.mean([row[name][weight] for row in rows], axis=0) for name in rows[0]}
        print(f"  {weight:<28}" + "".join(f"{n}: {a:.2f}, {b:.2f}".rjust(40) for n, (a, b) in ratios.items()))


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--topics", nargs="+", choices=["quality", "time"], default=["quality"])
    parser.add_argument("--problems", nargs="+", choices=[*PROBLEMS], default=[*PROBLEMS])
    parser.add_argument("--priors", nargs="+", choices=PRIORS, default=[*PRIORS])
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=[*ESTIMATORS])
    parser.add_argument("--epochs", type=int, default=6, help="epochs of all networks except the pooled one")
    parser.add_argument("--examples", type=int, default=10_000, help="number of training images")
    parser.add_argument(
        "--judged", type=int, default=3_000, help="number of scored images; a third as many from the other set"
    )
    parser.add_argument("--draws", type=int, default=12)
    parser.add_argument("--gradients", type=int, default=30, help="number of draws of the gradient")
    parser.add_argument("--repeats", type=int, default=30, help="timed steps of each network")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.epochs, options.draws, options.gradients, options.repeats = 1, 2, 2, 2, 2
        options.topics, options.problems = ["quality", "time"], ["pooled CNN"]
        options.priors, options.estimators = ["log_uniform"], ["auto"]
    problems = functools.cache(lambda title: PROBLEMS[title](options))
    if "quality" in options.topics:
        # A row depends only on these options, and not on which rows are selected.
        chosen = ("topics", "problems", "priors", "estimators", "repeats")
        recipe = argparse.Namespace(**{key: value for key, value in vars(options).items() if key not in chosen})
        show(common.learn_rows(names(options), recipe, functools.partial(learn, problems=problems, options=options)))
    if "time" in options.topics:
        path = None if options.out is None else options.out.with_stem(f"{options.out.stem}_time")
        common.keep(path, {"repeats": options.repeats, "steps": times(problems, options)})


if __name__ == "__main__":
    main()
