"""Out-of-distribution detection: train on digits or clothes, and detect images of the other kind by the uncertainty.

    python benchmarks/ood.py --images mnist --data DIR --out benchmarks/results/ood_mnist.json

The benchmark compares seven kinds of one small convolutional network, trained for the same number of epochs:

- plain, and ensemble: five plain networks;
- dropout: `MonteCarloDropout` before the dense layers, also active at prediction;
- bayesian: our layers with each prior, and an ensemble of five with the normal prior.

Dropout and the Bayesian networks predict by 40 draws; in the Bayesian ensemble, each member contributes eight of them.
The prediction is the mean probability over the draws, or over the members of the plain ensemble.

The scores on the test images of MNIST or Fashion-MNIST (`--images`) are accuracy, NLL and ECE. Two AUROCs tell how well
images of the other data set, or of the file `--ood`, are separated from these: by the predictive entropy, which is the
total uncertainty, and by the mutual information, which measures the disagreement between draws or members.

The architecture (pooling in place of strides) and the KL's temperature (0.3 in place of 1) were chosen by single trials
on a part of MNIST's training images (`--validation`). These trials also showed the AUROC against Fashion-MNIST.

DIR holds mnist.npz and fashion_mnist.npz with x_train, y_train, x_test, y_test: images of 28×28 bytes, and labels.
"""

import functools
import pathlib

import common
import images
import keras
import numpy as np
from keras import layers, ops

import keras_vdrop as kv
from keras_vdrop.functional import uncertainty
from keras_vdrop.scores import calibration, detection

OTHER = {"mnist": "fashion_mnist", "fashion_mnist": "mnist"}
PRIORS = ("log_uniform", "ard", "normal")
NETWORKS = ("plain", "ensemble", "dropout", *(f"bayesian, {prior}" for prior in PRIORS), "bayesian ensemble, normal")
MEMBERS, NUM_SAMPLES = 5, 40
# The title of each score, and the number of digits shown.
SCORES = {
    "accuracy": ("accuracy %", 2),
    "nll": ("NLL", 4),
    "ece": ("ECE %", 2),
    "auroc_entropy": ("AUROC, entropy", 4),
    "auroc_information": ("information", 4),
}


# Data and networks


def load(options):
    """Return the training data (x, y), the test data (x, y) and the x of the out-of-distribution images."""
    parts = images.load(options.data, None if options.quick else options.images, options.validation)
    if options.quick:
        return *parts.values(), np.random.default_rng(0).normal(size=(100, 28, 28, 1))
    path = options.ood or common.data_file(options.data, f"{OTHER[options.images]}.npz")
    with np.load(path) as file:
        return *parts.values(), images.scaled(file["x_test"])


def network(dense, convolution, dropout=None):
    """Build the network from images to ten logits, with the given layer classes."""
    noise = layers.Identity if dropout is None else functools.partial(kv.MonteCarloDropout, dropout)
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            convolution(16, 5, activation="relu"),
            layers.MaxPooling2D(2),
            convolution(32, 5, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            noise(),
            dense(128, activation="relu"),
            noise(),
            dense(10),
        ]
    )


def made(name):
    if not name.startswith("bayesian"):
        return network(layers.Dense, layers.Conv2D, 0.5 if name == "dropout" else None)
    prior = name.split(", ")[1]
    return network(*(functools.partial(cls, kernel_prior=prior) for cls in (kv.VariationalDense, kv.VariationalConv2D)))


def fit(model, x, y, options, callbacks=()):
    batch = 128
    steps = options.epochs * -(-len(x) // batch)
    rate = keras.optimizers.schedules.PolynomialDecay(2e-3, steps, 0.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Run 20 steps per call: on few cores, TensorFlow's steps otherwise wait for its input pipeline.
    model.compile(keras.optimizers.Adam(rate), loss, steps_per_execution=20)
    model.fit(x, y, batch_size=batch, epochs=options.epochs, callbacks=list(callbacks), verbose=0)
    return model


# Scores


def predictor(name, x, y, options):
    """Train, and return a function from images to the probabilities under all draws of all members, (S, B, 10)."""
    callbacks = []
    if name.startswith("bayesian"):
        warmup = max(1, options.epochs // 3)
        callbacks.append(kv.ELBO(len(x), warmup_epochs=warmup, temperature=options.temperature))
    members = [fit(made(name), x, y, options, callbacks) for _ in range(MEMBERS if "ensemble" in name else 1)]
    if name in ("plain", "ensemble"):
        return lambda x: np.stack([_softmax(model.predict(x, batch_size=500, verbose=0)) for model in members])
    samplers = [kv.MonteCarlo(model, NUM_SAMPLES // len(members), output="samples") for model in members]
    draws = [functools.partial(sampler.predict, batch_size=500, verbose=0) for sampler in samplers]
    return lambda x: _softmax(np.concatenate([draw(x) for draw in draws], axis=1)).swapaxes(0, 1)


def _softmax(logits):
    return ops.convert_to_numpy(ops.softmax(logits))


def learn(name, seed, data, options):
    """Train and score one kind of network with one seed."""
    keras.utils.set_random_seed(seed)
    (x, y), (x_test, y_test), other = data
    predict = predictor(name, x, y, options)
    inside, outside = (
        {key: ops.convert_to_numpy(value) for key, value in uncertainty.categorical(predict(x)).items()}
        for x in (x_test, other)
    )
    probability = inside["probability"]
    auroc = {
        f"auroc_{short}": detection.auroc(inside[key], outside[key])
        for short, key in (("entropy", "predictive_entropy"), ("information", "mutual_information"))
    }
    return {
        "accuracy": 100 * calibration.accuracy(probability, y_test),
        "nll": calibration.negative_log_likelihood(probability, y_test),
        "ece": 100 * calibration.expected_calibration_error(probability, y_test),
        **(auroc if name != "plain" else {"auroc_entropy": auroc["auroc_entropy"]}),
    }


def show(rows):
    print(f"\n{'':<24}" + "".join(f"{title:>18}" for title, _ in SCORES.values()))
    for name, each in rows.items():
        print(f"{name:<24}" + "".join(f"{_cell(each, key):>18}" for key in SCORES))


def _cell(rows, key):
    if key not in rows[0]:
        return "-"
    values, digits = [row[key] for row in rows], SCORES[key][1]
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=len(values) > 1):.{digits}f}"


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--images", choices=[*OTHER], default="mnist", help="images to train on")
    parser.add_argument(
        "--ood", type=pathlib.Path, help="a file with x_test (N, 28, 28), used instead of the other set"
    )
    parser.add_argument("--epochs", type=int, default=12, help="epochs of all networks")
    parser.add_argument("--temperature", type=float, default=0.3, help="temperature of the KL; 1 is the ELBO")
    parser.add_argument("--validation", action="store_true", help="score on 10,000 of the training images")
    options = parser.parse_args()
    if options.quick:
        options.epochs, options.seeds = 1, 1
    options.ood = None if options.ood is None else str(options.ood)
    learn_this = functools.partial(learn, data=load(options), options=options)
    show(common.learn_rows(NETWORKS, options, learn_this))


if __name__ == "__main__":
    main()
