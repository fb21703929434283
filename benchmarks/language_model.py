"""Compare word-level LSTM language models: plain, with Keras's dropout, with ours, and Bayesian, after equal steps.

A network consists of an embedding, LSTM layers, and a dense layer to the logits of the next word. The text is cut into
as many streams as a batch has rows, and each row continues where it ended in the batch before (`stateful`). Every token
is an example, so the KL weight is 1 / tokens. The defaults suit two cores: the beginning of WikiText-2 with its most
frequent words; one index stands for all others. This shows which networks overfit. Perplexities are comparable with
published ones only with the whole text and vocabulary (second command):

    python benchmarks/language_model.py --data DIR --out benchmarks/results/language_model.json
    python benchmarks/language_model.py --data DIR --tokens 0 --vocabulary 0 --units 650 --layers 2 --epochs 40

DIR holds wikitext-2/{train,valid,test}.txt.gz: the word-level WikiText-2 (Merity et al., 2016), gzipped.
"""

import collections
import functools
import gzip

import common
import keras
import numpy as np
from keras import layers

import keras_vdrop as kv

UNKNOWN = 0
NETWORKS = ("plain", "Keras dropout", "classic", "Bayesian, log_uniform", "Bayesian, ard")


def load(options):
    """Return {part: word indices} and the size of the vocabulary."""
    if options.quick:
        words = {
            part: _made_up(count, seed) for seed, (part, count) in enumerate({"train": 3000, "valid": 800}.items())
        }
        words["test"] = words["valid"]
    else:
        words = {part: _wikitext(options.data, part) for part in ("train", "valid", "test")}
    words.update({part: words[part][: options.tokens or None] for part in ("train", "valid")})
    frequent = collections.Counter(words["train"]).most_common(options.vocabulary or None)
    vocabulary = {word: index + 1 for index, (word, _) in enumerate(frequent) if word != "<unk>"}
    data = {part: np.array([vocabulary.get(word, UNKNOWN) for word in each]) for part, each in words.items()}
    return data, max(vocabulary.values()) + 1


def _wikitext(folder, part):
    return [word for line in wikitext(folder, part) for word in (*line, "<eos>")]


def wikitext(folder, part):
    """Return the nonempty lines of a part of WikiText-2 as lists of words."""
    with gzip.open(common.data_file(folder, "wikitext-2", f"{part}.txt.gz"), "rt", encoding="utf-8") as lines:
        return [line.split() for line in lines if line.strip()]


def _made_up(count, seed):
    """Return made-up words whose numbers mostly increase by one, modulo 50."""
    jumps = np.random.default_rng(seed).choice([1, 1, 1, 7], count)
    return [f"word{number}" for number in np.cumsum(jumps) % 50]


def batches(tokens, rows, steps):
    """Return inputs and targets, (batches·rows, steps) each, in the order that a stateful network needs."""
    count = (len(tokens) - 1) // (rows * steps)

    def streams(words):
        cut = words[: rows * count * steps].reshape(rows, count, steps)
        return np.swapaxes(cut, 0, 1).reshape(count * rows, steps)

    return streams(tokens[:-1]), streams(tokens[1:])


def network(name, size, options):
    """Build one of the five networks: an embedding, LSTM layers, and a dense layer to the logits."""
    masks = {"dropout": options.dropout, "recurrent_dropout": options.dropout}
    embedding, lstm, dense = layers.Embedding, layers.LSTM, layers.Dense
    if name == "Keras dropout":
        lstm = functools.partial(layers.LSTM, **masks)
    elif name == "classic":
        lstm = functools.partial(kv.VariationalLSTM, kernel_prior=None, output_dropout=options.dropout, **masks)
    elif name != "plain":
        prior, start = name.removeprefix("Bayesian, "), options.log_variance
        bayesian = {"kernel_prior": prior, "initial_log_variance": start, "log_variance_rate": 1.0}
        embedding = functools.partial(kv.VariationalEmbedding, estimator="local_reparameterization", **bayesian)
        lstm = functools.partial(kv.VariationalLSTM, **bayesian)
        # One draw per batch: noise for every token and word of the vocabulary would dominate the cost.
        dense = functools.partial(kv.VariationalDense, estimator="reparameterization", **bayesian)
    x = tokens = keras.Input((options.steps,), batch_size=options.batch, dtype="int32")
    x = embedding(size, options.units)(x)
    for _ in range(options.layers):
        x = lstm(options.units, return_sequences=True, stateful=True)(x)
    return keras.Model(tokens, dense(size)(x))


def forget(model):
    for layer in model.layers:
        if isinstance(layer, layers.LSTM):
            layer.reset_state()


def perplexity(model, x, y, rows):
    forget(model)
    nll = model.evaluate(x, y, batch_size=rows, verbose=0, return_dict=True)["nll"]
    forget(model)
    return float(np.exp(nll))


def learn(name, seed, data, size, options):
    """Train one network with one seed; return its perplexities after each epoch, and on the test after pruning."""
    keras.utils.set_random_seed(seed)
    model = network(name, size, options)
    parts = {part: batches(tokens, options.batch, options.steps) for part, tokens in data.items()}
    x, y = parts["train"]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    nll = keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="nll")
    steps = options.epochs * (len(x) // options.batch)
    rate = keras.optimizers.schedules.PolynomialDecay(options.rate, steps, options.rate / 20)
    model.compile(keras.optimizers.Adam(rate, global_clipnorm=1.0), loss, metrics=[nll])
    elbo = [kv.ELBO(len(x), warmup_epochs=options.warmup, temperature=options.temperature)]
    elbo = elbo if name.startswith("Bayesian") else []
    train, valid = [], []
    for epoch in range(options.epochs):
        fitted = model.fit(
            x,
            y,
            batch_size=options.batch,
            shuffle=False,
            initial_epoch=epoch,
            epochs=epoch + 1,
            callbacks=elbo,
            verbose=0,
        )
        train.append(float(np.exp(fitted.history["nll"][-1])))
        valid.append(perplexity(model, *parts["valid"], options.batch))
        print(f"{name}, epoch {epoch + 1}: training {train[-1]:.1f}, validation {valid[-1]:.1f}", flush=True)
    ratio = kv.prune(model).ratio if elbo else 1.0
    return {"train": train, "valid": valid, "ratio": ratio, "test": perplexity(model, *parts["test"], options.batch)}


def show(rows):
    titles = f"{'training':>12}{'best epoch':>14}{'valid at best':>14}{'valid at end':>14}{'test':>10}{'ratio':>8}"
    print(f"\n{'perplexity':<24}{titles}")
    for name, each in rows.items():
        best = [1 + int(np.argmin(row["valid"])) for row in each]
        columns = [
            [row["train"][-1] for row in each],
            [min(row["valid"]) for row in each],
            [row["valid"][-1] for row in each],
            [row["test"] for row in each],
            [row["ratio"] for row in each],
        ]
        train, there, end, test, ratio = (f"{np.mean(column):.1f}" for column in columns)
        print(f"{name:<24}{train:>12}{np.mean(best):>14.1f}{there:>14}{end:>14}{test:>10}{ratio:>8}")


def main():
    parser = common.parser(__doc__)
    parser.add_argument(
        "--tokens", type=int, default=100_000, help="tokens of the training and of the validation text; 0 for all"
    )
    parser.add_argument("--vocabulary", type=int, default=3_000, help="number of words in the vocabulary; 0 for all")
    parser.add_argument("--units", type=int, default=200, help="units of the embedding and of each LSTM")
    parser.add_argument("--layers", type=int, default=1, help="number of LSTMs")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=20, help="number of text streams in a batch")
    parser.add_argument("--steps", type=int, default=35, help="time steps through which gradients are propagated")
    parser.add_argument("--rate", type=float, default=2e-3, help="Adam's initial rate, which falls to a twentieth")
    parser.add_argument("--dropout", type=float, default=0.25, help="every dropout rate of the networks with dropout")
    parser.add_argument(
        "--log-variance", type=float, default=-8.0, help="initial log variance of the Bayesian networks"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.1, help="temperature of the KL; 1 is the ELBO, less fits more closely"
    )
    parser.add_argument("--warmup", type=int, default=5, help="epochs over which the KL weight rises")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.epochs, options.units, options.batch, options.steps = 1, 2, 8, 4, 5
    data, size = load(options)
    show(common.learn_rows(NETWORKS, options, functools.partial(learn, data=data, size=size, options=options)))


if __name__ == "__main__":
    main()
