"""How good is the uncertainty of every kind of layer with nothing but default arguments? Five small problems.

    KERAS_BACKEND=jax python benchmarks/certainty.py --out benchmarks/results/certainty.json

Each problem has held-out data, and two kinds of unfamiliar (out-of-distribution) inputs:

- CNN: scikit-learn's digits and the network of arrival.py. Unfamiliar: the same digits with shuffled pixels, or with
  inverted brightness.
- RNN: noisy sines of 20 steps with random frequency and phase. At every step, an LSTM predicts a normal distribution of
  the next value. Unfamiliar: sines of three times the frequency, and noise.
- tokens: sentences of 12 words. Each word has a value, "not" reverses the sign of the sum, and the binary label is
  drawn with the sum as its logit, so that it is inherently uncertain. The network has an embedding and attention.
  Unfamiliar: words absent from the training data, and sentences that repeat one word.
- segmentation: noisy 16×16 images of a disc. The label of a pixel (disc or background) is drawn with a probability that
  falls from 1 to 0 across the disc's border. The network is convolutional. Unfamiliar: noise, and two discs.
- 300 rows: regression on the sine of arrival.py, on two intervals. Unfamiliar: inputs beyond them, and between them.

Three networks per problem train for the same number of steps: "plain" has Keras's own layers; "default" has ours with
no arguments but those of Keras, and trains with `kv.ELBO(num_examples=len(x))`; "normal" adds `kernel_prior="normal"`.
All use Adam with a rate that falls linearly from 3e-3 to 0, and batches of 32. Only the number of epochs was tuned, by
trials with `--validation`, which replaces the test data by other data of the same kind. It is up to three times that of
a trial whose posteriors had not yet converged. Each seed has its own data and networks; the split of the digits is
fixed.

The result of each network holds:

- error or RMSE, NLL, and ECE or the coverage of a 90 % interval, on held-out data, by 64 draws. Every pixel and time
  step counts as a row.
- `spread`: the variance between draws of the probabilities (summed over the classes) or of the mean, averaged over
  16 held-out examples and their positions, by 1,000 draws. `of_posterior`: the ratio of this variance under
  `MonteCarlo(model)` to that under `MonteCarlo(model, consistent=True)`, which draws whole weights from the posterior
  and so is the reference. `of_posterior_pooled`: the same for averages over the positions of an example. Both ratios
  have standard errors.
- the AUROC for telling unfamiliar from held-out examples, by two measures, each averaged over positions: `epistemic`,
  the mutual information or the epistemic standard deviation; and `total`, the predictive entropy or the total standard
  deviation. Only `total` is meaningful for the plain network. Also the mean of each measure on both kinds of data.
- the KL in nats per example, the NLL per training example expected over draws, the number of weights kept at the
  default threshold (`left`), and the warnings of `ELBO`.
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
from keras_vdrop.functional import uncertainty
from keras_vdrop.scores import detection

KINDS = {"plain": None, "default": {}, "normal": {"kernel_prior": "normal"}}
RATE, BATCH = 3e-3, 32
# The numbers of synthetic held-out (or unfamiliar) examples, and of examples whose spread is measured.
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

    noise = (0.77 * rng.normal(size=(JUDGED, steps, 1))).astype("float32")  # the deviation of a noisy sine
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
    """Make sentences: word 0 is "not", and the last `unknown` words occur in no training sentence."""
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
        """Return the depth of every pixel inside the border of a random disc; negative outside."""
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
    # `--validation` draws its data from another random stream than the test data.
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


# Statistics of samples (N, S, ..., K): N examples, S draws, the axes of the positions, K outputs


def by_place(samples):
    """Reshape samples so that every position is a row, (N·positions, S, K)."""
    moved = np.moveaxis(samples, 1, -2)
    return moved.reshape(-1, *moved.shape[-2:])


def points(problem, samples):
    """Return the prediction under each draw, (N, S, ..., K): the class probabilities, or the mean with K = 1."""
    if isinstance(problem.likelihood, estimators.Numbers):
        return samples[..., :1].astype("float64")
    return np.exp(problem.likelihood.log_probability(samples).astype("float64"))


def doubts(problem, samples):
    """Return the epistemic and the total uncertainty of each example, each (N,), averaged over its positions."""
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
    """Return the variance between draws of (N, S, ..., K), and its standard error.

    The variance is summed over K and averaged over examples and positions.
    """
    count = of_draws.shape[1]
    squares = ((of_draws - of_draws.mean(1, keepdims=True)) ** 2).sum(-1)
    of_draw = squares.mean(tuple(axis for axis in range(squares.ndim) if axis != 1)) * count / (count - 1)
    return of_draw.mean(), of_draw.std(ddof=1) / np.sqrt(count)


def ratio(a, b):
    """Return a / b with its standard error; each of a and b is a pair (number, standard error)."""
    quotient = a[0] / b[0]
    return {"ratio": float(quotient), "error": float(quotient * np.hypot(a[1] / a[0], b[1] / b[0]))}


def pooled(of_draws):
    """Average (N, S, ..., K) over the positions, whose axes keep the size 1."""
    return of_draws.mean(tuple(range(2, of_draws.ndim - 1)), keepdims=True)


def spreads(problem, drawn, options):
    """Return the spread of the draws of `MonteCarlo`, and its ratio to the spread under draws of whole weights."""
    x = problem.data["test"][0][:ROWS]
    ours, whole = (points(problem, drawn(options.spread_draws, consistent)(x)) for consistent in (False, True))
    found = {"spread": float(variance(ours)[0]), "of_posterior": ratio(variance(ours), variance(whole))}
    if ours.ndim > 3:
        found["of_posterior_pooled"] = ratio(variance(pooled(ours)), variance(pooled(whole)))
    return found


# Training and scoring


def judged(problem, predict):
    """Score `predict`, a function from inputs to samples, on held-out data and against unfamiliar data."""
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
    """Train and score one network with one seed; `name` is "problem; kind"."""
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
    """Average the value under the nested `keys` over the rows, one for each seed."""
    return float(np.mean([functools.reduce(lambda found, key: found[key], keys, row) for row in rows]))


def show(rows):
    for name, each in rows.items():
        wrong, cover = ("error", "ece") if "error" in each[0] else ("rmse", "coverage")
        cells = {key: mean(each, key) for key in (wrong, "nll", cover, "kl", "train_nll", "left") if key in each[0]}
        for key in ("of_posterior", "of_posterior_pooled"):
            if key in each[0]:
                # The errors are not divided by the root of the number of seeds: all use the same random numbers.
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
    parser.add_argument("--draws", type=int, default=64, help="draws for the scored predictions")
    parser.add_argument("--spread-draws", type=int, default=1000, help="draws for the comparison with whole weights")
    parser.add_argument("--validation", action="store_true", help="score on other data than the published table")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.draws, options.spread_draws, options.kinds = 1, 8, 8, ["plain", "default"]
    names = [f"{title}; {kind}" for title in options.problems for kind in options.kinds]
    # A row depends only on these options, and not on which rows are selected.
    recipe = {key: value for key, value in vars(options).items() if key not in ("problems", "kinds")}
    show(common.learn_rows(names, argparse.Namespace(**recipe), functools.partial(learn, options=options)))


if __name__ == "__main__":
    main()
