"""Is a network as sure as it should be, for every kind of layer, by nothing but defaults? Five small problems.

    KERAS_BACKEND=jax python benchmarks/certainty.py --out benchmarks/results/certainty.json

- CNN: scikit-learn's digits, the network of arrival.py. Unfamiliar: the same digits with their pixels shuffled, or
  bright where they were dark.
- RNN: noisy sines of 20 steps, each of a frequency and phase of its own; at every step an LSTM predicts the next
  number, as a normal distribution. Unfamiliar: sines of three times the frequency, and noise.
- tokens: sentences of 12 words; each word has a value, "not" reverses the sum, and the label is drawn with the
  probability that comes of it, so that it can't be known for certain. An embedding and attention. Unfamiliar: words
  that no sentence for training has, and sentences of one word.
- segmentation: discs of 16×16 noisy pixels; whether a pixel is labelled as disc is drawn, with a probability that falls
  from 1 to 0 across its border. Convolutions. Unfamiliar: noise, and two discs.
- 300 rows: the sine of arrival.py, on two stretches. Unfamiliar: beyond them, and between them.

Of each, three networks learn for as many steps: "plain" is of Keras's own layers, "default" of ours with no argument
but Keras's own and with `kv.ELBO(num_examples=len(x))`, and "normal" has `kernel_prior="normal"` besides. All learn by
Adam from 3e-3 linearly to 0, in batches of 32. Nothing else was chosen: the number of epochs is up to three times that
of a trial by `--validation`, which shows other data of the same kind in place of the test's, and whose posteriors were
still on their way. Data and networks are others with every seed; the digits have one split.

Kept of each network:

- error, or RMSE; NLL; ECE, or how many of the numbers a 90 % interval covers: of held-out data, by 64 draws. Pixels and
  steps are rows here.
- `spread`: the variance between draws, of the probabilities (their sum over the classes) or of the mean, averaged over
  held-out examples and their places; `of_posterior`: that of `MonteCarlo(model)` as a ratio to that of whole weights,
  `MonteCarlo(model, consistent=True)`, which is what the posterior says. `of_posterior_pooled`: the same, of averages
  over the places of an example. With standard errors, of 1,000 draws of 16 examples.
- how well unfamiliar examples are told from held-out ones (AUROC), by the mutual information or the epistemic standard
  deviation, averaged over the places, and by the predictive entropy or the whole standard deviation, which is all that
  the plain network has; and the averages of both, held out and unfamiliar.
- the KL in nats an example, the NLL of an example for training, expected over draws, how many weights are left at the
  default threshold, and what `ELBO` warned of.
"""

import argparse
import functools
import warnings

import arrival
import common
import estimators
import keras
import numpy as np
from keras import layers

import keras_vdrop as kv
from keras_vdrop.functional import detection, uncertainty

KINDS = {"plain": None, "default": {}, "normal": {"kernel_prior": "normal"}}
RATE, BATCH = 3e-3, 32
# How many made-up examples no network learns from, and of how many the spread is compared.
JUDGED, ROWS = 400, 16


# Problems


def digits(rng, options):
    x, y = arrival.digits()
    cut = 1400
    if options.validation:
        x, y, cut = x[:cut], y[:cut], 1100
    shuffled = x[cut:].reshape(-1, 64)[:, rng.permutation(64)].reshape(-1, 8, 8, 1)
    data = {
        "train": (x[:cut], y[:cut]),
        "test": (x[cut:], y[cut:]),
        "other": {"shuffled": shuffled, "inverted": 1 - x[cut:]},
    }

    def network(make):
        return arrival.digits_network(make(kv.VariationalConv2D), make(kv.VariationalDense))

    return data, network, _classes(), 90


def series(rng, options, steps=20):
    def sines(count, low, high):
        frequency, phase = rng.uniform(low, high, (count, 1)), rng.uniform(0, 2 * np.pi, (count, 1))
        x = np.sin(frequency * np.arange(steps + 1) + phase) + 0.3 * rng.normal(size=(count, steps + 1))
        return x[:, :-1, None].astype("float32"), x[:, 1:].astype("float32")

    noise = (0.77 * rng.normal(size=(JUDGED, steps, 1))).astype("float32")  # as much as a sine and its noise
    data = {
        "train": sines(500, 0.4, 0.8),
        "test": sines(JUDGED, 0.4, 0.8),
        "other": {"faster": sines(JUDGED, 1.2, 2.4)[0], "noise": noise},
    }

    def network(make):
        lstm, dense = make(kv.VariationalLSTM), make(kv.VariationalDense)
        return keras.Sequential([keras.Input((steps, 1)), lstm(32, return_sequences=True), dense(2)])

    return data, network, estimators.Numbers(), 150


def sentences(rng, options, length=12, known=40, unknown=10):
    """Word 0 is "not"; of the others, the last ones are in no sentence for training."""
    values = np.concatenate([[0.0], rng.normal(size=known - 1)])

    def drawn(count):
        x = rng.integers(1, known, (count, length))
        negated = rng.random(count) < 0.5
        x[negated, rng.integers(0, length, negated.sum())] = 0
        logit = np.where(negated, -1, 1) * values[x].sum(1)
        return x.astype("int32"), (rng.random(count) < 1 / (1 + np.exp(-logit))).astype("float32")

    data = {
        "train": drawn(2000),
        "test": drawn(JUDGED),
        "other": {
            "unseen words": rng.integers(known, known + unknown, (JUDGED, length)).astype("int32"),
            "one word": np.repeat(rng.integers(1, known, (JUDGED, 1)), length, axis=1).astype("int32"),
        },
    }

    def network(make):
        embedding, attention, dense = map(
            make, (kv.VariationalEmbedding, kv.VariationalMultiHeadAttention, kv.VariationalDense)
        )
        tokens = keras.Input((length,), dtype="int32")
        h = embedding(known + unknown, 16)(tokens)
        h = layers.Add()([h, attention(2, 8)(h, h)])
        h = layers.GlobalAveragePooling1D()(dense(32, activation="relu")(h))
        return keras.Model(tokens, dense(1)(h))

    binary = functools.partial(keras.losses.BinaryCrossentropy, from_logits=True)
    return data, network, estimators.Classes(binary), 60


def discs(rng, options, side=16, noise=0.5, images=100):
    def within(count):
        """How far every pixel is within the border of a disc."""
        centre, radius = rng.uniform(4, side - 4, (2, count, 1, 1)), rng.uniform(2.5, 5, (count, 1, 1))
        rows, columns = np.mgrid[:side, :side]
        return radius - np.hypot(rows - centre[0], columns - centre[1])

    def seen(depth):
        return ((depth > 0)[..., None] + noise * rng.normal(size=(*depth.shape, 1))).astype("float32")

    def drawn(count):
        depth = within(count)
        return seen(depth), (rng.random(depth.shape) < 1 / (1 + np.exp(-2 * depth))).astype("int32")

    train, test = drawn(200), drawn(images)
    white = test[0].mean() + test[0].std() * rng.normal(size=test[0].shape)
    data = {
        "train": train,
        "test": test,
        "other": {
            "noise": white.astype("float32"),
            "two discs": seen(np.maximum(within(images), within(images))),
        },
    }

    def network(make):
        convolution = make(kv.VariationalConv2D)
        hidden = (convolution(16, 3, padding="same", activation="relu") for _ in range(3))
        return keras.Sequential([keras.Input((side, side, 1)), *hidden, convolution(2, 1)])

    return data, network, _classes(), 200


def rows(rng, options):
    data = {
        "train": arrival.sine(rng, 300),
        "test": arrival.sine(rng, JUDGED),
        "other": {
            "beyond": (rng.uniform(5, 7, (JUDGED, 1)) * rng.choice([-1, 1], (JUDGED, 1))).astype("float32"),
            "between": rng.uniform(-0.5, 0.5, (JUDGED, 1)).astype("float32"),
        },
    }
    data = {**data, **{part: (data[part][0], data[part][1][:, 0]) for part in ("train", "test")}}
    return data, lambda make: arrival.sine_network(make(kv.VariationalDense)), estimators.Numbers(), 400


def _classes():
    return estimators.Classes(functools.partial(keras.losses.SparseCategoricalCrossentropy, from_logits=True))


PROBLEMS = {"CNN": digits, "RNN": series, "tokens": sentences, "segmentation": discs, "300 rows": rows}


def problem_of(title, seed, options):
    # Not the test's numbers: what is judged by `--validation` is drawn from another stream.
    rng = np.random.default_rng([seed, options.validation])
    data, network, likelihood, epochs = PROBLEMS[title](rng, options)
    if options.quick:
        data = {
            "train": tuple(each[:ROWS] for each in data["train"]),
            "test": tuple(each[:ROWS] for each in data["test"]),
            "other": {name: each[:ROWS] for name, each in data["other"].items()},
        }
    epochs = 2 if options.quick else epochs
    return estimators.Problem(network, data, likelihood, epochs, BATCH, RATE)


# What draws say: samples (N, S, ..., K) of the outputs, places between the draws and the last axis


def by_place(samples):
    """Every place a row, (N·places, S, K)."""
    moved = np.moveaxis(samples, 1, -2)
    return moved.reshape(-1, *moved.shape[-2:])


def points(problem, samples):
    """What an answer is under each draw, (N, S, ..., K): the probabilities of the classes, or the mean."""
    if isinstance(problem.likelihood, estimators.Numbers):
        return samples[..., :1].astype("float64")
    return np.exp(problem.likelihood.log_probability(samples).astype("float64"))


def doubts(problem, samples):
    """Of each example, (N,), on average over its places: what the draws disagree about, and all that is uncertain."""
    places = tuple(range(1, samples.ndim - 2))
    if isinstance(problem.likelihood, estimators.Numbers):
        moments = kv.losses.NormalNLL().moments(np.moveaxis(samples, 1, 0))
        loc, variance = (np.asarray(keras.ops.convert_to_numpy(each), "float64") for each in moments)
        found = loc.var(0), np.sqrt(loc.var(0) + variance.mean(0))
        found = np.sqrt(found[0]), found[1]
    else:
        statistics = uncertainty.categorical(np.moveaxis(points(problem, samples), 1, 0))
        found = (keras.ops.convert_to_numpy(statistics[k]) for k in ("mutual_information", "predictive_entropy"))
    return {name: each.mean(places) if places else each for name, each in zip(("epistemic", "total"), found)}


def variance(of_draws):
    """Between draws of what is (N, S, ..., K), the sum over K and the mean over the rest, and its standard error."""
    count = of_draws.shape[1]
    squares = ((of_draws - of_draws.mean(1, keepdims=True)) ** 2).sum(-1)
    of_draw = squares.mean(tuple(axis for axis in range(squares.ndim) if axis != 1)) * count / (count - 1)
    return of_draw.mean(), of_draw.std(ddof=1) / np.sqrt(count)


def ratio(a, b):
    """Of two numbers with standard errors."""
    quotient = a[0] / b[0]
    return {"ratio": float(quotient), "error": float(quotient * np.hypot(a[1] / a[0], b[1] / b[0]))}


def pooled(of_draws):
    """(N, S, ..., K) on average over the places, which stay as axes of size 1."""
    return of_draws.mean(tuple(range(2, of_draws.ndim - 1)), keepdims=True)


def spreads(problem, drawn, options):
    """How far the draws of `MonteCarlo` spread, and as a ratio to those of whole weights."""
    x = problem.data["test"][0][:ROWS]
    ours, whole = (points(problem, drawn(options.spread_draws, consistent)(x)) for consistent in (False, True))
    found = {"spread": float(variance(ours)[0]), "of_posterior": ratio(variance(ours), variance(whole))}
    if ours.ndim > 3:
        found["of_posterior_pooled"] = ratio(variance(pooled(ours)), variance(pooled(whole)))
    return found


# Learning and judging


def judged(problem, predict):
    """Scores of held-out data, and how they differ from unfamiliar ones, by a function from inputs to samples."""
    x, y = problem.data["test"]
    inside = predict(x)
    scores = problem.likelihood.scores(by_place(inside), y.ravel())
    inside = doubts(problem, inside)
    outside = {name: doubts(problem, predict(each)) for name, each in problem.data["other"].items()}
    return {
        **{key: value for key, value in scores.items() if key != "spread"},
        "held_out": {key: float(each.mean()) for key, each in inside.items()},
        "unfamiliar": {
            name: {
                key: {"mean": float(each.mean()), "auroc": detection.auroc(inside[key], each)}
                for key, each in of.items()
            }
            for name, of in outside.items()
        },
    }


def learn(name, seed, options):
    """One network with one seed."""
    title, kind = name.split("; ")
    problem = problem_of(title, seed, options)
    keras.utils.set_random_seed(seed)
    if kind == "plain":
        model = problem.network(estimators.keras_layer)
        estimators.fit(model, problem)
        return judged(problem, estimators.without_noise(model))
    model = problem.network(estimators.variational(**KINDS[kind]))
    x, y = problem.train
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RuntimeWarning)
        estimators.fit(model, problem, [kv.ELBO(num_examples=len(x))])
    drawn = functools.cache(functools.partial(estimators.drawing, model))
    predict = drawn(options.draws, False)
    report = kv.sparsity(model)
    return {
        **judged(problem, predict),
        **spreads(problem, drawn, options),
        "kl": float(kv.kl_divergence(model)) / len(x),
        "train_nll": problem.likelihood.nll(by_place(predict(x)), y.ravel()) * y[0].size,
        "weights": report.weights,
        "left": report.left,
        "warned": [str(each.message) for each in said if issubclass(each.category, RuntimeWarning)],
    }


def mean(rows, *keys):
    """Over the seeds, of what lies under those keys."""
    return float(np.mean([functools.reduce(lambda found, key: found[key], keys, row) for row in rows]))


def show(rows):
    for name, each in rows.items():
        wrong, cover = ("error", "ece") if "error" in each[0] else ("rmse", "coverage")
        cells = {key: mean(each, key) for key in (wrong, "nll", cover, "kl", "train_nll", "left") if key in each[0]}
        for key in ("of_posterior", "of_posterior_pooled"):
            if key in each[0]:
                # Not less for several seeds: they draw by the same random numbers.
                cells[key] = f"{mean(each, key, 'ratio'):.3f} ± {mean(each, key, 'error'):.3f}"
        for unfamiliar in each[0]["unfamiliar"]:
            kinds = ("epistemic", "total") if "kl" in each[0] else ("total",)
            aurocs = (f"{mean(each, 'unfamiliar', unfamiliar, kind, 'auroc'):.3f} {kind}" for kind in kinds)
            cells[f"AUROC {unfamiliar}"] = ", ".join(aurocs)
        print(f"\n{name}, {len(each)} seeds")
        for key, value in cells.items():
            print(f"  {key:<28}{value if isinstance(value, str) else format(value, '.4g')}")


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--problems", nargs="+", choices=[*PROBLEMS], default=[*PROBLEMS])
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS])
    parser.add_argument("--draws", type=int, default=64, help="to judge by")
    parser.add_argument("--spread-draws", type=int, default=1000, help="to compare with whole weights")
    parser.add_argument("--validation", action="store_true", help="judge by other data than those of the table")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.draws, options.spread_draws, options.kinds = 1, 8, 8, ["plain", "default"]
    names = [f"{title}; {kind}" for title in options.problems for kind in options.kinds]
    # What a row depends on, whichever rows are asked for.
    recipe = {key: value for key, value in vars(options).items() if key not in ("problems", "kinds")}
    show(common.learn_rows(names, argparse.Namespace(**recipe), functools.partial(learn, options=options)))


if __name__ == "__main__":
    main()
