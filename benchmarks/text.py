"""Code that the sentence benchmarks share: data as word indices, training, and scores."""

import collections
import gzip

import common
import keras
import numpy as np

from keras_vdrop.scores import calibration

LENGTH, BATCH = 48, 64

# Settings behind the result tables. Noise starts high, since a network memorises these sentences before noise can grow,
# and log variances change slowly. SPARSIFIER also draws separate noise for every word, which prunes most.
SLOW = {"initial_log_variance": -7.0, "log_variance_rate": 1.0}
SPARSIFIER = {**SLOW, "estimator": "local_reparameterization"}
PADDING, UNKNOWN = 0, 1


def load(options):
    """Return {part: (indices (N, LENGTH), labels (N, 1))} and the size of the vocabulary.

    The parts are "train" (80 %), "validation" (10 %) and "test" (10 %), the same for all seeds. The vocabulary consists
    of words of the training sentences, and of two indices for padding and unknown words.
    """
    sentences, labels = made_up() if options.quick else rt_polarity(options.data)
    parts = split(len(labels))
    vocabulary = _vocabulary(sentences[i] for i in parts["train"])
    ids = _encode(sentences, vocabulary)
    data = {name: (ids[rows], labels[rows, None].astype("float32")) for name, rows in parts.items()}
    return data, len(vocabulary) + 2


def split(count):
    """Split `count` sentences at random, the same way in every run, and return {part: indices of the sentences}."""
    order = np.random.default_rng(0).permutation(count)
    cuts = [int(0.8 * count), int(0.9 * count)]
    return dict(zip(("train", "validation", "test"), np.split(order, cuts)))


def rt_polarity(folder):
    """Return film-review sentences as lists of words, and their labels: 1 for positive, 0 for negative.

    Reads `rt-polarity/rt-polarity.{pos,neg}.gz`: the sentence polarity data set 1.0 of Pang and Lee (2005), one
    sentence per line, gzipped, UTF-8.
    """
    sentences, labels = [], []
    for kind, label in (("neg", 0), ("pos", 1)):
        path = common.data_file(folder, "rt-polarity", f"rt-polarity.{kind}.gz")
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            found = [line.split() for line in lines if line.strip()]
        sentences += found
        labels += [label] * len(found)
    return sentences, np.array(labels)


def made_up(count=600, seed=0):
    """Return sentences of made-up words, some of which reveal the label, in place of `rt_polarity`."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    words = rng.integers(0, 200, (count, 12))
    words[:, ::4] = rng.integers(0, 10, (count, 3)) + 10 * labels[:, None]
    return [[f"word{word}" for word in row] for row in words], labels


def _vocabulary(sentences):
    """Return {word: index} of the words that occur at least twice, the most frequent first."""
    counts = collections.Counter(word for words in sentences for word in words)
    return {word: index + 2 for index, (word, count) in enumerate(counts.most_common()) if count > 1}


def _encode(sentences, vocabulary):
    """Return indices (N, LENGTH). Long sentences are cut at the end, short ones padded."""
    ids = np.full((len(sentences), LENGTH), PADDING, "int32")
    for row, words in zip(ids, sentences):
        words = words[:LENGTH]
        row[: len(words)] = [vocabulary.get(word, UNKNOWN) for word in words]
    return ids


def compile_for(model, data, rate, epochs):
    """Compile with Adam, whose learning rate falls linearly to 0 over `epochs`."""
    steps = epochs * -(-len(data["train"][0]) // BATCH)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.PolynomialDecay(rate, steps, 0.0)),
        keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy(threshold=0.0, name="accuracy")],
    )


def fit(model, data, **arguments):
    model.fit(*data["train"], batch_size=BATCH, validation_data=data["validation"], verbose=0, **arguments)


def fit_best(model, data, rate, epochs):
    """Train a network without a KL, and restore the weights of the epoch with the best validation accuracy."""
    best = keras.callbacks.EarlyStopping("val_accuracy", patience=epochs, restore_best_weights=True)
    compile_for(model, data, rate, epochs)
    fit(model, data, epochs=epochs, callbacks=[best])


def scores(model, data):
    """Return the scores on the parts that were not trained on, {"validation": {...}, "test": {...}}."""
    return {part: _score(model, *data[part]) for part in ("validation", "test")}


def _score(model, x, y):
    """Return accuracy and ECE in per cent, and the NLL in nats."""
    one = 1.0 / (1.0 + np.exp(-model.predict(x, verbose=0).ravel().astype("float64")))
    probability = np.stack([1.0 - one, one], axis=-1)
    y = y.ravel()
    return {
        "accuracy": 100 * float(calibration.accuracy(probability, y)),
        "nll": float(calibration.negative_log_likelihood(probability, y)),
        "ece": 100 * float(calibration.expected_calibration_error(probability, y)),
    }


def sizes(report):
    """Return the entries of a row that come from a `kv.Sparsity` report."""
    layers = {row.name: [row.weights, row.left] for row in report.layers}
    return {"weights": report.weights, "left": report.left, "layers": layers}


def dense_sizes(model):
    """Return the number of kernel and table weights of a Keras network, all kept; other weights do not count."""
    counted = ("kernel", "recurrent_kernel", "embeddings")
    weights = sum(int(np.prod(v.shape)) for v in model.trainable_variables if v.name in counted)
    return {"weights": weights, "left": weights}


def show(rows):
    """Print a table of a dict of lists of rows: one line per network, statistics over the seeds."""
    print(f"\n{'':<24}{'test accuracy %':>18}{'NLL':>14}{'ECE %':>14}{'weights':>12}{'ratio':>18}")
    for name, each in rows.items():
        figures = [common.spread([row["test"][metric] for row in each]) for metric in ("accuracy", "nll", "ece")]
        left = np.mean([row["left"] for row in each])
        ratio = common.spread([row["weights"] / row["left"] for row in each])
        print(f"{name:<24}{figures[0]:>18}{figures[1]:>14}{figures[2]:>14}{left:>12,.0f}{ratio:>18}")
