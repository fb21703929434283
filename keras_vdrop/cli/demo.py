"""`keras-vdrop demo`: compare a small convolutional network that is plain, with Keras's dropout, and variational."""

import functools
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import keras
import numpy as np
from keras import layers

import keras_vdrop as kv
from keras_vdrop.checks import check_non_negative
from keras_vdrop.files import replace
from keras_vdrop.scores import calibration

THRESHOLD = 3.0
# With log variances that rise slowly, pruning keeps fewer weights than with the defaults.
SLOW = {"initial_log_variance": -8.0, "log_variance_rate": 1.0}
NUM_SAMPLES = 32

# For each threshold: the number of kept weights, the accuracies of the draws, and the accuracy of the mean.
Frontier: TypeAlias = tuple[list[int], list[np.ndarray], list[float]]


def load_digits(seed: int) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Return scikit-learn's 1,797 digits of 8×8 pixels as (x, y), (x_test, y_test); four fifths are training data."""
    from sklearn import datasets, model_selection

    digits: Any = datasets.load_digits()
    x = (digits.images[..., None] / 16.0).astype("float32")
    x, x_test, y, y_test = model_selection.train_test_split(
        x, digits.target, test_size=0.2, stratify=digits.target, random_state=seed
    )
    return (x, y), (x_test, y_test)


def network(dense: Callable[..., Any], convolution: Callable[..., Any], dropout: float = 0.0) -> keras.Sequential:
    """Return two convolutions and two dense layers of the given classes, from 8×8 pixels to ten logits."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            convolution(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            convolution(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            *([layers.Dropout(dropout)] if dropout else []),
            dense(128, activation="relu"),
            *([layers.Dropout(dropout)] if dropout else []),
            dense(10),
        ]
    )


def train(
    model: keras.Model,
    x: np.ndarray,
    y: np.ndarray,
    epochs: int,
    callbacks: Iterable[keras.callbacks.Callback] = (),
    rate: float = 2e-3,
    verbose: Literal["auto", 2] = "auto",
) -> keras.Model:
    """Train with Adam. The learning rate falls linearly to 0; most weights pass the pruning threshold as it falls."""
    batch = 64
    decay = keras.optimizers.schedules.PolynomialDecay(rate, epochs * -(-len(x) // batch), end_learning_rate=0.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(decay), loss, metrics=["accuracy"])
    model.fit(x, y, batch_size=batch, epochs=epochs, callbacks=list(callbacks), verbose=verbose)
    return model


def probabilities(model: keras.Model, x: np.ndarray) -> Any:
    """Return the softmax of a model's logits."""
    logits = model.predict(x, batch_size=len(x), verbose=0)
    return keras.ops.convert_to_numpy(keras.ops.softmax(logits))


def frontier(sampler: kv.MonteCarlo, x: np.ndarray, y: np.ndarray, thresholds: Iterable[float]) -> Frontier:
    """Prune at each threshold; return weights kept, accuracies of the draws, and accuracies of the mean.

    Afterwards, the model of the `MonteCarlo` has the same weights as before.
    """
    model = sampler.model
    before = model.get_weights()
    left, samples, mean = [], [], []
    for threshold in thresholds:
        left.append(kv.prune(model, threshold).left)
        draws = sampler.predict(x, batch_size=len(x), verbose=0)
        samples.append((draws.argmax(-1) == y[:, None]).mean(axis=0))
        mean.append(calibration.accuracy(probabilities(model, x), y))
        model.set_weights(before)
    return left, samples, mean


def draw(model: keras.Model, frontier: Frontier, chosen: int, path: str | os.PathLike) -> None:
    """Save a figure of log alpha of all weights, and of accuracy against size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    left, samples, mean = frontier
    figure, (one, other) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    kv.plots.log_alpha_histogram(model, THRESHOLD, ax=one)
    kv.plots.metric_against_weights(left, samples, mean, chosen, metric="test accuracy", ax=other)
    try:
        replace(path, lambda beside: figure.savefig(beside, dpi=120))
    finally:
        plt.close(figure)


def row(name: str, probability: np.ndarray, y: np.ndarray, left: int, ratio: float = 1.0) -> str:
    """Return a line of the table."""
    scores = (calibration.accuracy, calibration.negative_log_likelihood, calibration.expected_calibration_error)
    accuracy, nll, ece = (score(probability, y) for score in scores)
    return f"{name:<34}{100 * accuracy:>7.1f} %{nll:>8.3f}{100 * ece:>7.1f} %{left:>10,}{ratio:>8.1f}x"


def fresh_folder(path: str | os.PathLike) -> pathlib.Path:
    """Make and return a folder, with a number appended to its name if that is taken: nothing is overwritten."""
    path = pathlib.Path(path)
    candidates = (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in itertools.count(1))
    folder = next(candidate for candidate in candidates if _is_free(candidate))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_free(path: pathlib.Path) -> bool:
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def train_all(x: np.ndarray, y: np.ndarray, epochs: int, beta: float) -> tuple[keras.Model, keras.Model, keras.Model]:
    """Train and return the plain network, the one with Keras's dropout, and the variational one."""
    # Keras's progress bar moves the cursor and colours its text, which is noise in a file or a pipe.
    learn = functools.partial(train, x=x, y=y, epochs=epochs, verbose="auto" if sys.stdout.isatty() else 2)
    print("\nPlain network")
    plain = learn(network(layers.Dense, layers.Conv2D))
    print("\nWith Keras's Dropout(0.5)")
    dropout = learn(network(layers.Dense, layers.Conv2D, dropout=0.5))
    print(f"\nVariational: the KL weight rises to {beta:g} / {len(x)} over the first half of the epochs")
    elbo = kv.ELBO(num_examples=len(x), schedule=lambda epoch: beta * min(1.0, 2 * epoch / epochs))
    variational = network(*(functools.partial(cls, **SLOW) for cls in (kv.VariationalDense, kv.VariationalConv2D)))
    learn(variational, callbacks=[elbo, kv.SparsityLogger()], rate=6e-3)
    return plain, dropout, variational


def print_table(rows: Iterable[str], title: str) -> None:
    """Print the lines of the table below the names of its columns."""
    print(f"{title:<34}{'accuracy':>9}{'NLL':>8}{'ECE':>9}{'weights':>10}{'ratio':>9}")
    print("-" * 79)
    print("\n".join(rows))


def run(out: str | os.PathLike = "demo", seed: int = 0, quick: bool = False, beta: float = 0.3) -> int:
    """Train all three networks, print a table (if not `quick`), and write `model.keras` and `digits.png` to a folder.

    Args:
        out: The folder; `fresh_folder` appends a number if it holds files.
        seed: Int, the seed of the split, the weights and the noise.
        quick: Whether to train for only a few epochs.
        beta: Float ≥ 0, the weight of the KL in units of 1 / (number of examples). 1 is the ELBO; less is a tempered
            posterior, which keeps more weights: 1,437 digits are few to determine 52,768 weights.

    Returns:
        The exit status: 0, or 1 if the predictions of the reloaded model differ.

    Raises:
        ValueError: For a `beta` that is out of range.
        OSError: If the folder cannot be written to; before any training if the folder cannot be made.
    """
    check_non_negative("beta", beta)
    start = time.monotonic()
    out = fresh_folder(out)
    epochs = 4 if quick else 50
    keras.utils.set_random_seed(seed)
    (x, y), (x_test, y_test) = load_digits(seed)

    plain, dropout, model = train_all(x, y, epochs, beta)
    trained = {"plain": plain, "Keras Dropout": dropout, "variational": model}
    weights = kv.sparsity(model).weights
    rows = [row(name, probabilities(each, x_test), y_test, weights) for name, each in trained.items()]
    sampler = kv.MonteCarlo(model, NUM_SAMPLES, output="samples", seed=seed)
    curve = frontier(sampler, x_test, y_test, thresholds=np.arange(-3.0, 13.0, 5.0 if quick else 1.0))
    report = kv.sparsity(model, THRESHOLD)
    draw(model, curve, report.left, out / "digits.png")
    kv.prune(model, THRESHOLD)
    rows += [row("variational, pruned", probabilities(model, x_test), y_test, report.left, report.ratio)]
    name = f"variational, pruned, {NUM_SAMPLES} draws"
    rows += [row(name, probabilities(sampler, x_test).mean(axis=1), y_test, report.left, report.ratio)]

    print(f"\n{report}\n")
    if quick:
        print(f"{epochs} epochs are too few to compare the networks. Run the demo without --quick for the comparison.")
    else:
        print_table(rows, f"on {len(y_test)} test digits")

    replace(out / "model.keras", model.save)
    again = keras.saving.load_model(out / "model.keras")
    same = np.array_equal(probabilities(again, x_test), probabilities(model, x_test))
    print(f"\nWrote {out / 'model.keras'}. After reloading, its predictions are {'equal' if same else 'DIFFERENT'}.")
    print(f"Wrote {out / 'digits.png'}.")
    print(
        "\nNext steps: replace your Keras layers by kv.VariationalDense, VariationalConv2D or VariationalLSTM,"
        "\npass kv.ELBO(num_examples=len(x)) to fit, print(kv.sparsity(model)), then call kv.prune(model)."
    )
    print(f"({time.monotonic() - start:.0f} s on the {keras.backend.backend()} backend)")
    return 0 if same else 1
