"""A small Transformer classifier of film-review sentences, all of it variational, beside its deterministic twin.

Embedding of words and places, one block of attention and two dense layers, the mean over time, and a logit. Both are
trained on the same 80 % of the sentences. On 10 % the twin's best epoch is found, and both recipes (the twin's
dropout and learning rate among them) were chosen; nothing was chosen on the last 10 %.

The columns of the word table are groups: each has a prior of its own scale, and goes as a whole. What is left is a few
numbers a word, drawn towards 0 for words that are rare. All other weights go one by one. The network is pruned before
the last epochs, which are for what is left: LayerNormalization has until then seen the noise of columns that go.

    python benchmarks/text_transformer.py --data DIR --seeds 3 --out benchmarks/results/text_transformer.json

DIR holds rt-polarity/rt-polarity.{pos,neg}.gz: the sentence polarity data set 1.0, one sentence a line, gzipped.
"""

import collections
import functools
import time

import common
import keras
import numpy as np
from keras import layers

import keras_vdrop as kv
from keras_vdrop.functional import calibration

LENGTH, WIDTH, HEADS, HIDDEN, BATCH = 48, 64, 4, 128, 64
PADDING, UNKNOWN = 0, 1


def encode(sentences, vocabulary):
    """Indices (N, LENGTH), the end of long sentences cut off."""
    ids = np.full((len(sentences), LENGTH), PADDING, "int32")
    for row, words in zip(ids, sentences):
        words = words[:LENGTH]
        row[: len(words)] = [vocabulary.get(word, UNKNOWN) for word in words]
    return ids


def vocabulary_of(sentences):
    """The words that occur at least twice, by falling frequency."""
    counts = collections.Counter(word for words in sentences for word in words)
    return {word: index + 2 for index, (word, count) in enumerate(counts.most_common()) if count > 1}


def classifier(embedding, attention, dense, size, dropout=0.0):
    """The network, of layers that the three functions make."""
    tokens = keras.Input((LENGTH,), dtype="int32")
    place = keras.ops.cumsum(keras.ops.ones_like(tokens), axis=1) - 1
    words = embedding(size, WIDTH, mask_zero=True, name="words")(tokens)
    x = layers.Dropout(dropout)(layers.Add()([words, embedding(LENGTH, WIDTH, name="places")(place)]))
    y = layers.LayerNormalization()(x)
    y = attention(HEADS, WIDTH // HEADS, name="attention")(y, y)
    x = layers.Add()([x, layers.Dropout(dropout)(y)])
    y = dense(HIDDEN, activation="relu", name="wide")(layers.LayerNormalization()(x))
    y = dense(WIDTH, name="narrow")(y)
    x = layers.LayerNormalization()(layers.Add()([x, layers.Dropout(dropout)(y)]))
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(tokens, dense(1, name="logit")(layers.Dropout(dropout)(x)))


def deterministic(size, dropout):
    return classifier(layers.Embedding, layers.MultiHeadAttention, layers.Dense, size, dropout)


def variational(size):
    def of(cls, prior="ard"):
        # Noise from the beginning: with the usual −10 the network has learned the training set before noise can grow.
        return functools.partial(cls, kernel_prior=prior, initial_log_variance=-7.0)

    embedding = of(kv.VariationalEmbedding, kv.priors.ARD(group_axis=-1))
    return classifier(embedding, of(kv.VariationalMultiHeadAttention), of(kv.VariationalDense), size)


def compile_for(model, data, rate, epochs):
    """Adam, whose rate falls linearly to 0."""
    steps = epochs * -(-len(data["train"][0]) // BATCH)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.PolynomialDecay(rate, steps, 0.0)),
        keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy(threshold=0.0, name="accuracy")],
    )


def fit(model, data, **arguments):
    model.fit(*data["train"], batch_size=BATCH, validation_data=data["validation"], verbose=0, **arguments)


def score(model, part):
    """Accuracy and ECE in per cent, NLL in nats."""
    x, y = part[0], part[1].ravel()
    one = 1.0 / (1.0 + np.exp(-model.predict(x, verbose=0).ravel().astype("float64")))
    probability = np.stack([1.0 - one, one], axis=-1)
    return {
        "accuracy": 100 * float(calibration.accuracy(probability, y)),
        "nll": float(calibration.negative_log_likelihood(probability, y)),
        "ece": 100 * float(calibration.expected_calibration_error(probability, y)),
    }


def kernels(model):
    """How many weights the Keras layers of the twin have, biases and normalisations not counted."""
    counted = ("kernel", "embeddings")
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables if v.name in counted)


def run(seed, data, size, options):
    """Both networks with one seed."""
    keras.utils.set_random_seed(seed)
    plain = deterministic(size, options.dropout)
    best = keras.callbacks.EarlyStopping("val_accuracy", patience=options.epochs, restore_best_weights=True)
    compile_for(plain, data, 5e-4, options.epochs)
    fit(plain, data, epochs=options.epochs, callbacks=[best])

    keras.utils.set_random_seed(seed)
    ours = variational(size)
    elbo = kv.ELBO(len(data["train"][0]), start_epoch=1, warmup_epochs=options.warmup, temperature=options.temperature)
    compile_for(ours, data, options.rate, options.epochs)
    pruned_at = options.epochs - options.tuning
    fit(ours, data, epochs=pruned_at, callbacks=[elbo])
    kv.prune(ours)
    fit(ours, data, initial_epoch=pruned_at, epochs=options.epochs, callbacks=[elbo])
    report = kv.prune(ours)
    print(report, flush=True)
    return {
        "seed": seed,
        "twin": {**{part: score(plain, data[part]) for part in ("validation", "test")}, "weights": kernels(plain)},
        "variational": {
            **{part: score(ours, data[part]) for part in ("validation", "test")},
            "weights": report.weights,
            "left": report.left,
            "ratio": report.ratio,
            "layers": {row.name: [row.weights, row.left] for row in report.layers},
        },
    }


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--epochs", type=int, default=15, help="of both; the twin keeps its best")
    parser.add_argument("--rate", type=float, default=2e-3, help="Adam's first rate for the variational network")
    parser.add_argument("--warmup", type=int, default=5, help="epochs over which the KL weight rises")
    parser.add_argument("--tuning", type=int, default=6, help="how many of the epochs come after pruning")
    parser.add_argument(
        "--temperature", type=float, default=0.3, help="of the KL: 1 is the ELBO, less keeps more weights"
    )
    parser.add_argument("--dropout", type=float, default=0.5, help="of the twin")
    options = parser.parse_args()
    if options.quick:
        options.epochs, options.seeds, options.warmup, options.tuning = 2, 1, 1, 1
        sentences, labels = common.made_up_sentences()
    else:
        sentences, labels = common.rt_polarity(options.data)
    parts = dict(zip(("train", "validation", "test"), common.split(len(labels))))
    vocabulary = vocabulary_of([sentences[i] for i in parts["train"]])
    ids = encode(sentences, vocabulary)
    data = {name: (ids[rows], labels[rows, None].astype("float32")) for name, rows in parts.items()}

    runs = []
    for seed in range(options.seeds):
        begin = time.perf_counter()
        runs.append(run(seed, data, len(vocabulary) + 2, options))
        print(
            f"seed {seed}: {time.perf_counter() - begin:.0f} s",
            {k: v for k, v in runs[-1].items() if k != "seed"},
            flush=True,
        )

    print(f"\n{'':<14}{'test accuracy %':>18}{'NLL':>14}{'ECE %':>14}{'weights':>12}{'ratio':>16}")
    for name in ("twin", "variational"):
        test = [one[name]["test"] for one in runs]
        left = np.mean([one[name].get("left", one[name]["weights"]) for one in runs])
        figures = [common.spread([row[metric] for row in test]) for metric in ("accuracy", "nll", "ece")]
        ratio = common.spread([one[name].get("ratio", 1.0) for one in runs])
        print(f"{name:<14}{figures[0]:>18}{figures[1]:>14}{figures[2]:>14}{left:>12,.0f}{ratio:>16}")
    common.keep(
        options.out, {"options": {k: v for k, v in vars(options).items() if k not in ("data", "out")}, "runs": runs}
    )


if __name__ == "__main__":
    main()
