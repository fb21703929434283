"""Compare LSTM classifiers of film-review sentences: plain, with Keras's dropout, with ours, and Bayesian.

A network consists of an embedding of width 300, an LSTM of 128 units, and a dense layer to one logit. It is trained on
80 % of the sentences. Another 10 % served to choose all settings, and select the best epoch of the three networks
without a KL. No choice uses the last 10 %, the test set.

The Bayesian networks are pruned in three steps, each of which starts from the weights of the step before. Step 1 treats
the columns of the word table as groups and prunes most of them, so that few numbers per word are kept. Step 2 prunes
single weights: gates, units, and words that carry no information. Step 3 fine-tunes the kept weights with a smaller KL
weight. "light KL" uses a small KL weight throughout and only steps 1 and 2, since step 3 would overfit.

    python benchmarks/text_lstm.py --data DIR --seeds 3 --out benchmarks/results/text_lstm.json

DIR holds rt-polarity/rt-polarity.{pos,neg}.gz: the sentence polarity data set 1.0, one sentence per line, gzipped.
"""

import argparse
import functools

import common
import keras
import numpy as np
import text
from keras import layers

import keras_vdrop as kv

WIDTH, UNITS = 300, 128
LIGHT = "Bayesian, ard, light KL"
NETWORKS = ("plain", "Keras dropout", "classic", "Bayesian, log_uniform", "Bayesian, ard", LIGHT)


def classifier(embedding, lstm, dense, size):
    """Build the network from functions that make its embedding, LSTM and dense layer."""
    tokens = keras.Input((text.LENGTH,), dtype="int32")
    words = embedding(size, WIDTH, mask_zero=True, name="words")(tokens)
    return keras.Model(tokens, dense(1, name="logit")(lstm(UNITS, name="lstm")(words)))


def dropped_out(name, size, rate):
    """Build a network without a KL: the plain one, or one with dropout in the LSTM."""
    masks = {"dropout": rate, "recurrent_dropout": rate}
    lstm = {
        "plain": layers.LSTM,
        "Keras dropout": functools.partial(layers.LSTM, **masks),
        "classic": functools.partial(kv.VariationalLSTM, kernel_prior=None, output_dropout=rate, **masks),
    }[name]
    return classifier(layers.Embedding, lstm, layers.Dense, size)


def bayesian(prior, size, of_words):
    """Build the network with a posterior for every kernel; `of_words` is the prior of the word table."""

    def of(cls, prior):
        of_places = text.SPARSIFIER if cls is not kv.VariationalLSTM else text.SLOW
        return functools.partial(cls, kernel_prior=prior, **of_places)

    return classifier(
        of(kv.VariationalEmbedding, of_words), of(kv.VariationalLSTM, prior), of(kv.VariationalDense, prior), size
    )


def learn_bayesian(prior, data, size, options):
    """Run one step per temperature; return the pruned network and its sparsity report."""
    examples = len(data["train"][0])
    ends = [options.columns, options.columns + options.single, options.columns + options.single + options.tuning]

    columns = bayesian(prior, size, kv.priors.ARD(group_axis=-1))
    text.compile_for(columns, data, options.rate, ends[-1])
    elbo = kv.ELBO(examples, start_epoch=1, warmup_epochs=options.columns - 1, temperature=options.temperatures[0])
    text.fit(columns, data, epochs=ends[0], callbacks=[elbo])
    print(kv.prune(columns, 3.0), flush=True)

    single = bayesian(prior, size, prior)
    single.set_weights(columns.get_weights())
    text.compile_for(single, data, options.rate * (1 - ends[0] / ends[-1]), ends[-1] - ends[0])
    for begin, end, temperature in zip(ends, ends[1:], options.temperatures[1:]):
        elbo = kv.ELBO(examples, temperature=temperature)
        text.fit(single, data, initial_epoch=begin, epochs=end, callbacks=[elbo])
        report = kv.prune(single, options.threshold)
        print(report, flush=True)
    return single, report


def left_of_kernels(model):
    """Return the number of kept weights of each kernel, named after what the kernel multiplies."""
    words, lstm, logit = (model.get_layer(name) for name in ("words", "lstm", "logit"))
    weights = {
        "embedding": words.embeddings,
        "inputs": lstm.cell.kernel,
        "state": lstm.cell.recurrent_kernel,
        "outputs": logit.kernel,
    }
    return {name: int(keras.ops.count_nonzero(weight.mean())) for name, weight in weights.items()}


def learn(name, seed, data, size, options):
    """Train one network with one seed; return its scores, its number of weights, and how many are kept."""
    keras.utils.set_random_seed(seed)
    if name == LIGHT:
        options = argparse.Namespace(**{**vars(options), "temperatures": options.light, "tuning": 0})
    if name.startswith("Bayesian"):
        model, report = learn_bayesian(name.split(", ")[1], data, size, options)
        return {**text.scores(model, data), **text.sizes(report), "kernels": left_of_kernels(model)}
    model = dropped_out(name, size, options.dropout)
    text.fit_best(model, data, 1e-3, options.epochs)
    return {**text.scores(model, data), **text.dense_sizes(model)}


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--epochs", type=int, default=6, help="epochs of the networks without a KL; the best is kept")
    parser.add_argument("--dropout", type=float, default=0.5, help="every dropout rate of the networks with dropout")
    parser.add_argument("--rate", type=float, default=2e-3, help="Adam's initial rate for the Bayesian networks")
    parser.add_argument("--columns", type=int, default=4, help="epochs of the first step, one of them without the KL")
    parser.add_argument("--single", type=int, default=8, help="epochs of the second step")
    parser.add_argument("--tuning", type=int, default=8, help="epochs of the third step")
    parser.add_argument(
        "--temperatures", type=float, nargs=3, default=[0.3, 0.6, 0.4], help="temperature of the KL in each step"
    )
    parser.add_argument(
        "--light", type=float, nargs=2, default=[0.1, 0.2], help="temperature of the light KL in the two steps"
    )
    parser.add_argument(
        "--threshold", type=float, default=2.0, help="threshold on log alpha after the second and third steps"
    )
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.epochs, options.columns, options.single, options.tuning = 1, 1, 2, 1, 1
    data, size = text.load(options)
    rows = common.learn_rows(NETWORKS, options, functools.partial(learn, data=data, size=size, options=options))
    text.show(rows)
    for name, each in rows.items():
        if "kernels" in each[0]:
            left = {of: f"{np.mean([row['kernels'][of] for row in each]):,.0f}" for of in each[0]["kernels"]}
            print(f"{name}: kept weights of " + ", ".join(f"{of} {count}" for of, count in left.items()))


if __name__ == "__main__":
    main()
