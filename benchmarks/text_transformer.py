"""Compare a variational Transformer classifier of film-review sentences with its deterministic twin.

The small network consists of embeddings of words and positions, one block of attention and two dense layers, the mean
over time, and a dense layer to one logit. Both versions are trained on the same 80 % of the sentences. Another 10 %
served to choose the settings of both (among them the twin's dropout and learning rate), and select the twin's best
epoch. No choice uses the last 10 %, the test set.

The columns of the embedding tables are groups: each has its own prior scale and is pruned as a whole. A few numbers per
word are kept, shrunk towards 0 for rare words. All other kernels are pruned weight by weight. The network is pruned
before the last epochs, which fine-tune the kept weights: until then, LayerNormalization also sees the noise of the
columns that pruning removes.

    python benchmarks/text_transformer.py --data DIR --seeds 3 --out benchmarks/results/text_transformer.json

DIR holds rt-polarity/rt-polarity.{pos,neg}.gz: the sentence polarity data set 1.0, one sentence per line, gzipped.
"""

import functools

import common
import keras
import text
from keras import layers

import keras_vdrop as kv

WIDTH, HEADS, HIDDEN = 64, 4, 128


def classifier(embedding, attention, dense, size, dropout=0.0):
    """Build the network from functions that make its embeddings, attention and dense layers."""
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
    """Train one network with one seed; return its scores, its number of weights, and how many are kept."""
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
    parser.add_argument(
        "--epochs", type=int, default=15, help="epochs of both networks; the twin keeps its best weights"
    )
    parser.add_argument("--rate", type=float, default=2e-3, help="Adam's initial rate for the variational network")
    parser.add_argument("--warmup", type=int, default=5, help="epochs over which the KL weight rises")
    parser.add_argument("--tuning", type=int, default=6, help="how many of these epochs follow pruning")
    parser.add_argument(
        "--temperature", type=float, default=0.3, help="temperature of the KL; 1 is the ELBO, less keeps more weights"
    )
    parser.add_argument("--dropout", type=float, default=0.5, help="dropout rate of the twin")
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
