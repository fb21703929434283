"""The demonstration: one small convolutional network, plain, with Keras's dropout and variational, side by side."""

import pathlib
import time

import keras
import numpy as np
from keras import layers

import keras_vdrop as kv
from keras_vdrop.functional import calibration

THRESHOLD = 3.0
NUM_SAMPLES = 64


def load_digits(seed):
    """Scikit-learn's 1,797 digits of 8×8 pixels, four fifths to train on: (x, y), (x_test, y_test)."""
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    x = (digits.images[..., None] / 16.0).astype("float32")
    x, x_test, y, y_test = model_selection.train_test_split(
        x, digits.target, test_size=0.2, stratify=digits.target, random_state=seed
    )
    return (x, y), (x_test, y_test)


def network(dense, convolution, dropout=0.0):
    """Two convolutions and two dense layers, of the given classes, from 8×8 pixels to ten logits."""
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


def train(model, x, y, epochs, callbacks=(), rate=2e-3, verbose="auto"):
    """Adam, its rate falling linearly to 0, as the recipes for sparse variational dropout have it."""
    batch = 64
    decay = keras.optimizers.schedules.PolynomialDecay(rate, epochs * -(-len(x) // batch), end_learning_rate=0.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(decay), loss, metrics=["accuracy"])
    model.fit(x, y, batch_size=batch, epochs=epochs, callbacks=list(callbacks), verbose=verbose)
    return model


def probabilities(model, x):
    """The softmax of a model's logits, by the mean of its weights."""
    logits = model.predict(x, batch_size=len(x), verbose=0)
    return keras.ops.convert_to_numpy(keras.ops.softmax(logits))


def frontier(model, x, y, thresholds):
    """Prune at one threshold after another: weights left, accuracy of each of S draws, accuracy of the mean.

    The model comes out as it went in.
    """
    before = model.get_weights()
    sampler = kv.MonteCarlo(model, 32, output="samples", seed=0)
    left, samples, mean = [], [], []
    for threshold in thresholds:
        left.append(kv.prune(model, threshold).left)
        draws = sampler.predict(x, batch_size=len(x), verbose=0)
        samples.append((draws.argmax(-1) == y[:, None]).mean(axis=0))
        mean.append(calibration.accuracy(probabilities(model, x), y))
        model.set_weights(before)
    return left, samples, mean


def draw(model, frontier, chosen, path):
    """The picture: log alpha of all weights, and accuracy against size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    left, samples, mean = frontier
    figure, (one, other) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    kv.plots.log_alpha_histogram(model, THRESHOLD, ax=one)
    kv.plots.metric_against_weights(left, samples, mean, chosen, metric="test accuracy", ax=other)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def row(name, probability, y, weights, left):
    """A line of the table."""
    scores = (calibration.accuracy, calibration.negative_log_likelihood, calibration.expected_calibration_error)
    accuracy, nll, ece = (score(probability, y) for score in scores)
    return f"{name:<34}{100 * accuracy:>7.1f} %{nll:>8.3f}{100 * ece:>7.1f} %{left:>10,}{weights / left:>8.1f}x"


def run(out="demo", seed=0, quick=False):
    """Train all three, print the table, write `model.keras` and `digits.png` to the folder `out`.

    Returns:
        0, or 1 where the reloaded model predicts anything else.
    """
    start = time.monotonic()
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    epochs = 12 if quick else 80
    keras.utils.set_random_seed(seed)
    (x, y), (x_test, y_test) = load_digits(seed)

    print(f"\nPlain network: {epochs // 4} epochs")
    plain = train(network(layers.Dense, layers.Conv2D), x, y, epochs // 4)
    print(f"\nWith Keras's Dropout(0.5): {epochs // 4} epochs")
    dropout = train(network(layers.Dense, layers.Conv2D, dropout=0.5), x, y, epochs // 4)
    print(f"\nVariational: {epochs} epochs, the KL weight rising over the first half")
    elbo = kv.ELBO(num_examples=len(x), start_epoch=epochs // 16, warmup_epochs=epochs // 2)
    model = train(network(kv.VariationalDense, kv.VariationalConv2D), x, y, epochs, [elbo, kv.SparsityLogger()])

    dense = kv.sparsity(model).weights
    rows = [row("plain", probabilities(plain, x_test), y_test, dense, dense)]
    rows += [row("Keras Dropout", probabilities(dropout, x_test), y_test, dense, dense)]
    rows += [row("variational", probabilities(model, x_test), y_test, dense, dense)]
    curve = frontier(model, x_test, y_test, thresholds=np.arange(-6.0, 13.0))
    report = kv.sparsity(model, THRESHOLD)
    draw(model, curve, report.left, out / "digits.png")
    kv.prune(model, THRESHOLD)
    rows += [row("variational, pruned", probabilities(model, x_test), y_test, dense, report.left)]
    sampler = kv.MonteCarlo(model, NUM_SAMPLES, likelihood="categorical", seed=seed)
    statistics = sampler.predict(x_test, batch_size=len(x_test), verbose=0)
    name = f"variational, pruned, {NUM_SAMPLES} draws"
    rows += [row(name, statistics["probability"], y_test, dense, report.left)]

    print(f"\n{report}\n")
    print(
        f"{'on ' + str(len(y_test)) + ' test digits':<34}{'accuracy':>9}{'NLL':>8}{'ECE':>9}{'weights':>10}{'ratio':>9}"
    )
    print("-" * 79)
    print("\n".join(rows))

    model.save(out / "model.keras")
    again = keras.saving.load_model(out / "model.keras")
    same = np.array_equal(probabilities(again, x_test), probabilities(model, x_test))
    print(f"\n{out / 'model.keras'}: written; reloaded, its predictions are {'equal' if same else 'DIFFERENT'}.")
    print(f"{out / 'digits.png'}: written.")
    print(
        "\nWhat to do next: put kv.VariationalDense, VariationalConv2D or VariationalLSTM where you have the Keras"
        "\nlayer, pass kv.ELBO(num_examples=len(x)) to fit, print(kv.sparsity(model)), then kv.prune(model)."
    )
    print(f"({time.monotonic() - start:.0f} s on the {keras.backend.backend()} backend)")
    return 0 if same else 1
