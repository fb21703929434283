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

import functools

import common
import keras
import text
from keras import layers

import keras_vdrop as kv

WIDTH, HEADS, HIDDEN = 64, 4, 128


def classifier(embedding, attention, dense, size, dropout=0.0):
    """The network, of layers that the three functions make."""
    tokens = keras.Input((text.LENGTH,), dtype="int32")
    place = keras.ops.cumsum(keras.ops.ones_like(tokens), axis=1) - 1
    words = embedding(size, WIDTH, mask_zero=True, name="words")(tokens)
    x = layers.Dropout(dropout)(layers.Add()([words, embedding(text.LENGTH, WIDTH, name="places")(place)]))
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
        return functools.partial(cls, kernel_prior=prior, **text.SPARSIFIER)

    embedding = of(kv.VariationalEmbedding, kv.priors.ARD(group_axis=-1))
    return classifier(embedding, of(kv.VariationalMultiHeadAttention), of(kv.VariationalDense), size)


def learn(name, seed, data, size, options):
    """One network with one seed: its scores, its weights and how many of them are left."""
    keras.utils.set_random_seed(seed)
    if name == "twin":
        twin = deterministic(size, options.dropout)
        text.fit_best(twin, data, 5e-4, options.epochs)
        return {**text.scores(twin, data), **text.dense_sizes(twin)}

    ours = variational(size)
    elbo = kv.ELBO(len(data["train"][0]), start_epoch=1, warmup_epochs=options.warmup, temperature=options.temperature)
    text.compile_for(ours, data, options.rate, options.epochs)
    pruned_at = options.epochs - options.tuning
    text.fit(ours, data, epochs=pruned_at, callbacks=[elbo])
    kv.prune(ours, 3.0)
    text.fit(ours, data, initial_epoch=pruned_at, epochs=options.epochs, callbacks=[elbo])
    report = kv.prune(ours, 3.0)
    print(report, flush=True)
    return {**text.scores(ours, data), **text.sizes(report)}


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
    data, size = text.load(options)
    rows = common.learn_rows(
        ("twin", "variational"), options, functools.partial(learn, data=data, size=size, options=options)
    )
    text.show(rows)


if __name__ == "__main__":
    main()
