"""Regression on UCI data sets: test error and log-likelihood, beside published figures.

    KERAS_BACKEND=jax JAX_THREEFRY_PARTITIONABLE=0 python benchmarks/uci.py --data DIR --out benchmarks/results/uci.json

The benchmark runs on every backend. JAX is the fastest for its many small matrix products, and the setting above halves
the cost of JAX's random numbers.

DIR/uci holds one NAME.npz per data set: X (n, d), y (n,), and the row indices of each split, train (splits, n_train)
and test (splits, n_test). `--sets` selects data sets; the default is the seven in `SETS`.

Every network has one hidden layer of 50 units (100 for protein) and predicts the mean and the noise of y. On a given
data set, all train for the same number of epochs by Adam. Each component of the gradient is clipped to [−1, 1], because
outliers among protein's inputs would distort Adam's mean squares for thousands of steps. The methods are:

- bayesian, ard and bayesian, normal: our layers with that prior on the weights (normal: standard deviation 0.3);
- bayesian ensemble: five of our networks with the ARD prior, 400 draws of each;
- concrete dropout: dropout with learned rates;
- mc dropout: `MonteCarloDropout` before both layers, and weight decay;
- ensemble: five plain networks with weight decay.

The hyperparameters are: whether the noise depends on the input, the temperature of the KL, the dropout rate and the
weight decay. They are chosen for each split by the log-likelihood of a held-out fifth of its training rows, with two
networks in place of five for ensembles. The final networks then train on all training rows.

The error is the root mean square error. The log-likelihood is log (1/S) Σ p(y | x, w_s) over 2,000 draws, or over the
5 networks of the plain ensemble. Both are in the units of y, reported as mean ± standard error over the splits. The
logarithm of a mean over few draws is biased low: on held-out rows of concrete and wine, 200 draws give 0.01 to 0.02
less than 4,000.

The networks of all splits form one model, whose kernels have an axis for the splits. They share no weights and train
simultaneously.
"""

import dataclasses
import functools
import itertools
import math

import common
import keras
import numpy as np
from keras import layers, ops

import keras_vdrop as kv
from keras_vdrop.functional import likelihoods
from keras_vdrop.scores import regression

SETS = (
    "bostonHousing",
    "concrete",
    "energy",
    "wine-quality-red",
    "power-plant",
    "naval-propulsion-plant",
    "protein-tertiary-structure",
)
UNITS = {"protein-tertiary-structure": 100}
MEMBERS, MEMBERS_THAT_CHOOSE = 5, 2
DRAWS_THAT_CHOOSE = 200

# Test error and log-likelihood. Sources: MC dropout, Mukhoti et al., 2018 (Gal's splits, one hidden layer); deep
# ensembles, Lakshminarayanan et al., 2017; concrete dropout, Gal et al., 2017 (other splits and networks).
PUBLISHED = {
    "bostonHousing": {"mc dropout": (2.90, -2.40), "deep ensembles": (3.28, -2.41), "concrete dropout": (2.65, -2.72)},
    "concrete": {"mc dropout": (4.82, -2.93), "deep ensembles": (6.03, -3.06), "concrete dropout": (4.46, -3.51)},
    "energy": {"mc dropout": (0.54, -1.21), "deep ensembles": (2.09, -1.38), "concrete dropout": (0.46, -2.30)},
    "naval-propulsion-plant": {
        "mc dropout": (0.00, 4.45),
        "deep ensembles": (0.00, 5.63),
        "concrete dropout": (0.00, 5.87),
    },
    "power-plant": {"mc dropout": (4.01, -2.80), "deep ensembles": (4.11, -2.79), "concrete dropout": (3.70, -2.75)},
    "protein-tertiary-structure": {
        "mc dropout": (4.27, -2.87),
        "deep ensembles": (4.71, -2.83),
        "concrete dropout": (3.85, -2.81),
    },
    "wine-quality-red": {
        "mc dropout": (0.62, -0.93),
        "deep ensembles": (0.64, -0.94),
        "concrete dropout": (0.62, -1.70),
    },
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """Hyperparameters that are chosen on the held-out rows.

    Attributes:
        heteroscedastic: Whether the noise depends on the input.
        amount: The strength of regularisation: the KL's temperature or the dropout rate.
        decay: The precision of a normal prior on the weights, whose negative log density is the weight decay.
    """

    heteroscedastic: bool
    amount: float = 1.0
    decay: float = 0.0


def _grid(amounts=(1.0,), decays=(0.0,)):
    return [Choice(*each) for each in itertools.product((True, False), amounts, decays)]


GRIDS = {
    "bayesian, ard": _grid(amounts=(0.3, 1.0)),
    "bayesian, normal": _grid(amounts=(0.3, 1.0)),
    "bayesian ensemble": _grid(amounts=(0.3, 1.0)),
    "concrete dropout": _grid(),
    "mc dropout": _grid(amounts=(0.005, 0.02, 0.1), decays=(0.1, 1.0)),
    "ensemble": _grid(decays=(0.01, 0.1, 1.0)),
}


# Data


@dataclasses.dataclass
class Rows:
    """Rows of every split, x (n, splits, d) and y (n, splits), standardised by the training rows of the split."""

    x: np.ndarray
    y: np.ndarray


class Splits:
    """A data set and the row indices of its splits."""

    def __init__(self, x, y, train, test):
        self.x, self.y, self.train, self.test = x, y, train, test

    def __len__(self):
        return len(self.train)

    def of(self, which):
        """Return the splits with these indices."""
        return Splits(self.x, self.y, self.train[which], self.test[which])

    def hold_out(self, seed=0):
        """Return splits whose test rows are a random fifth of the training rows, which no longer train."""
        rng = np.random.default_rng(seed)
        train = np.stack([rng.permutation(rows) for rows in self.train])
        cut = train.shape[1] * 4 // 5
        return Splits(self.x, self.y, train[:, :cut], train[:, cut:])

    def rows(self):
        """Return the training rows and the test rows, standardised."""
        x, y = self.x[self.train], self.y[self.train]
        scale = x.std(axis=1, keepdims=True)
        scale[scale == 0.0] = 1.0

        def standardised(rows):
            x_rows = (self.x[rows] - x.mean(axis=1, keepdims=True)) / scale
            y_rows = (self.y[rows] - y.mean(axis=1, keepdims=True)) / self.unit[:, None]
            return Rows(x_rows.swapaxes(0, 1).astype("float32"), y_rows.swapaxes(0, 1).astype("float32"))

        return standardised(self.train), standardised(self.test)

    @property
    def unit(self):
        """The standard deviation of y over the training rows of each split."""
        return self.y[self.train].std(axis=1)


def load(name, options):
    if options.quick:
        rng = np.random.default_rng(0)
        x = rng.normal(size=(60, 3))
        rows = np.stack([rng.permutation(60) for _ in range(3)])
        return Splits(x, x[:, 0] + 0.1 * rng.normal(size=60), rows[:, :50], rows[:, 50:])
    with np.load(common.data_file(options.data, "uci", f"{name}.npz")) as file:
        return Splits(*(file[key] for key in ("X", "y", "train", "test")))


# Networks


def network(method, choice, units, rows):
    """Build a model from x (B, splits, d) to the mean and the raw scale of the noise, (B, splits, 2)."""
    inputs = keras.Input(rows.x.shape[1:])
    outputs = 2 if choice.heteroscedastic else 1
    if method == "concrete dropout":
        # Each layer has one dropout rate, so every split needs its own layers.
        parts = [_concrete(inputs[:, split], units, outputs) for split in range(inputs.shape[1])]
        h = ops.stack(parts, axis=1)
    else:
        # Batched products of small matrices are fastest with the splits on the first axis.
        h = _layers(method, choice, ops.swapaxes(inputs, 0, 1), units, outputs, len(rows.x))
        h = ops.swapaxes(h, 0, 1)
    return keras.Model(inputs, h if choice.heteroscedastic else kv.losses.learned_scale(h[..., 0]))


def _concrete(x, units, outputs):
    for width, activation in ((units, "relu"), (outputs, None)):
        x = kv.ConcreteDropout(layers.Dense(width, activation=activation, kernel_initializer="he_normal"))(x)
    return x


def _layers(method, choice, h, units, outputs, num_examples):
    for width, activation in ((units, "relu"), (outputs, None)):
        arguments = {
            "bias_axes": "so",
            "activation": activation,
            "kernel_initializer": keras.initializers.RandomNormal(stddev=math.sqrt(2.0 / h.shape[-1])),
        }
        if method.startswith("bayesian"):
            prior = kv.priors.Normal(0.3) if method.endswith("normal") else "ard"
            layer = functools.partial(
                kv.VariationalEinsumDense,
                kernel_prior=prior,
                initial_log_variance=-7.0,
                log_variance_rate=1.0,
                estimator="local_reparameterization",  # examples are on the second axis; each uses every weight once
                **arguments,
            )
        else:
            if method == "mc dropout":
                h = kv.MonteCarloDropout(choice.amount)(h)
            decay = keras.regularizers.L2(0.5 * choice.decay / num_examples)
            layer = functools.partial(layers.EinsumDense, kernel_regularizer=decay, **arguments)
        h = layer("sbi,sio->sbo", (None, width))(h)
    return h


def learn(model, method, choice, rows, options):
    count, batch = len(rows.x), batch_size(len(rows.x))
    epochs = options.epochs or epochs_of(count)
    steps = epochs * -(-count // batch)
    rate = keras.optimizers.schedules.CosineDecay(options.rate, steps)
    model.compile(keras.optimizers.Adam(rate, clipvalue=1.0), kv.losses.NormalNLL(), jit_compile=True)
    callbacks = []
    if method.startswith("bayesian") or method == "concrete dropout":
        temperature = choice.amount
        callbacks.append(kv.ELBO(count, warmup_epochs=max(1, epochs // 5), temperature=temperature))
    model.fit(rows.x, rows.y, batch_size=batch, epochs=epochs, callbacks=callbacks, verbose=0)


def batch_size(count):
    return 32 if count < 2_000 else 256


def epochs_of(count):
    """Return the number of epochs that take about 10,000 steps."""
    return round(10_000 * batch_size(count) / count)


def draws(model, method, x, members, num_samples):
    """Return the mean and the scale of the noise, each (S, n, splits), under all draws of all members together."""
    if method == "ensemble":
        outputs = model.predict_on_batch(x)[:, None]
    else:
        sampler = kv.MonteCarlo(model, num_samples // members, output="samples", sample_batch_size=1)
        outputs = sampler.predict_on_batch(x)
    outputs = outputs.reshape(*outputs.shape[:2], members, -1, 2).astype("float64")
    loc, raw_scale = outputs.reshape(len(x), -1, *outputs.shape[3:]).transpose(3, 1, 0, 2)
    return loc, ops.convert_to_numpy(likelihoods.scale_of(raw_scale))


def scores(method, choice, splits, units, options, members, num_samples):
    """Train the networks of all splits; return the error and the log-likelihood of each split, in the units of y.

    Ensembles have `members` networks per split, other methods one.
    """
    keras.utils.set_random_seed(0)
    learned, judged = splits.rows()
    members = members if method.endswith("ensemble") else 1
    learned = Rows(np.tile(learned.x, (1, members, 1)), np.tile(learned.y, (1, members)))
    model = network(method, choice, units, learned)
    learn(model, method, choice, learned, options)
    loc, scale = draws(model, method, np.tile(judged.x, (1, members, 1)), members, num_samples)
    error = splits.unit * np.sqrt(np.mean((loc.mean(axis=0) - judged.y) ** 2, axis=0))
    likelihood = [
        -regression.normal_mixture_negative_log_likelihood(loc[..., i], scale[..., i], judged.y[:, i])
        for i in range(len(splits))
    ]
    return error, np.array(likelihood) - np.log(splits.unit)


# Results


def row_of(name, method, options):
    """Choose the hyperparameters of each split on its held-out rows, then train on all of its training rows."""
    splits, units = load(name, options), UNITS.get(name, 50)
    grid = GRIDS[method][:1] if options.quick else GRIDS[method]
    held_out = [
        scores(method, choice, splits.hold_out(), units, options, MEMBERS_THAT_CHOOSE, DRAWS_THAT_CHOOSE)[1]
        for choice in grid
    ]
    chosen = np.argmax(held_out, axis=0)
    error, likelihood = np.empty(len(splits)), np.empty(len(splits))
    for index in np.unique(chosen):
        which = np.flatnonzero(chosen == index)
        error[which], likelihood[which] = scores(
            method, grid[index], splits.of(which), units, options, MEMBERS, options.draws
        )
    return {
        "chosen": [dataclasses.asdict(grid[index]) for index in chosen],
        "error": error.tolist(),
        "log_likelihood": likelihood.tolist(),
    }


def standard_error(values):
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) / math.sqrt(len(values)):.3f}"


def show(rows):
    """Print our results beside the published ones."""
    print(f"\n{'':<62}{'RMSE':>18}{'log-likelihood':>18}")
    for name, ((row),) in rows.items():
        print(f"{name:<62}{standard_error(row['error']):>18}{standard_error(row['log_likelihood']):>18}")
        of_set, _, method = name.partition(": ")
        if method == list(GRIDS)[-1]:
            for source, (error, likelihood) in PUBLISHED.get(of_set, {}).items():
                print(f"{f'{of_set}: {source}, published':<62}{error:>18.2f}{likelihood:>18.2f}")


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--sets", nargs="+", default=list(SETS), help="names of the data sets")
    parser.add_argument("--methods", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    parser.add_argument("--epochs", type=int, help="number of epochs, instead of 10,000 steps")
    parser.add_argument("--draws", type=int, default=2_000, help="number of draws of all members together")
    parser.add_argument("--rate", type=float, default=5e-3, help="Adam's initial rate")
    options = parser.parse_args()
    options.seeds = 1
    if options.quick:
        options.sets, options.epochs = options.sets[:1], 2
    names = [f"{name}: {method}" for name in options.sets for method in options.methods]
    # These only select rows. `--resume` compares the other options with those of the file.
    del options.sets, options.methods

    def learn_this(name, seed):
        of_set, _, method = name.partition(": ")
        return row_of(of_set, method, options)

    show(common.learn_rows(names, options, learn_this))


if __name__ == "__main__":
    main()
