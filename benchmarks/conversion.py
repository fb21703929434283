"""Measure what converting a network to variational layers and fine-tuning it costs: time and memory, several methods.

    pip install torch && pip install --no-deps bayesian-torch
    python benchmarks/conversion.py --networks resnet --out benchmarks/results/conversion_resnet.json
    python benchmarks/conversion.py --networks encoder --out benchmarks/results/conversion_encoder.json

The benchmark fine-tunes two randomly initialised networks with Adam and a ten-class cross-entropy:

- a ResNet-18 (11 million weights, batches of 32 images of 28 × 28);
- an encoder with the shapes of MiniLM, a small BERT (6 layers, width 384, 22 million weights, batches of 32 sentences
  of 40 tokens).

It compares these variants of each network:

- the original Keras layers;
- `to_variational` on convolutions, dense layers and attention, once with each estimator;
- `to_variational` on all layers (the default), which includes the embedding tables of the encoder;
- one `Variational` around the whole network;
- encoder only: updates of rank 8 in the dense and attention layers, by Keras's `enable_lora` and by
  `to_variational(rank=8)`;
- if they are installed: the network in PyTorch, and bayesian-torch's `dnn_to_bnn` on its convolutions and dense layers,
  with both of its estimators.

The result holds for each variant: the number of trainable parameters; the time of a step in ms (median of interleaved
repeats) and its ratio to the baseline: the original Keras layers, `enable_lora` for the rank-8 variants, or the network
in PyTorch; the seconds of the conversion and of the first step, which includes compilation; the growth of the process
in MB during conversion and during five steps; and its peak memory in the steps. The times of conversion and first step
and the memory are measured in a separate process for each variant. `dnn_to_bnn` changes the given network in place;
`to_variational` returns a new one.
"""

import functools
import time

import common
import finetune_vision
import keras
import numpy as np
import peers
import speed
from keras import layers

import keras_vdrop as kv

RANK, CLASSES = 8, 10
RESNET, ENCODER = "resnet", "encoder"
TITLES = {RESNET: "ResNet-18, 32 images", ENCODER: "MiniLM, 32 sentences of 40 tokens"}
# ResNet: filters of the stages, blocks per stage. Encoder: vocabulary, layers, width, heads.
FULL = {RESNET: ((64, 128, 256, 512), 2), ENCODER: (30_522, 6, 384, 12)}
QUICK = {RESNET: ((4, 8), 1), ENCODER: (50, 1, 16, 2)}
BATCH, LENGTH = 32, 40


# Networks


def keras_network(name, sizes):
    if name == RESNET:
        return finetune_vision.network(*sizes)
    return _encoder(*sizes)


def _encoder(words, depth, width, heads):
    tokens = keras.Input((LENGTH,), dtype="int32")
    h = layers.Embedding(words, width)(tokens)
    numbers = keras.ops.zeros_like(tokens) + keras.ops.arange(LENGTH, dtype="int32")
    h = layers.LayerNormalization()(h + layers.Embedding(LENGTH, width)(numbers))
    for _ in range(depth):
        h = layers.LayerNormalization()(h + layers.MultiHeadAttention(heads, width // heads)(h, h))
        inner = layers.Dense(4 * width, activation="gelu")(h)
        h = layers.LayerNormalization()(h + layers.Dense(width)(inner))
    return keras.Model(tokens, layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(h)))


def data(name, sizes):
    """Return one random batch and its labels."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, CLASSES, BATCH)
    if name == RESNET:
        return rng.normal(size=(BATCH, 28, 28, 1)).astype("float32"), y
    return rng.integers(0, sizes[0], (BATCH, LENGTH)).astype("int32"), y


# Conversions

KL = {"kl_weight": peers.KL_WEIGHT}
KERNELS = (layers.Conv2D, layers.Dense, layers.MultiHeadAttention)
ADAPTED = (layers.Dense, layers.MultiHeadAttention)


def _converted(model, **arguments):
    return kv.to_variational(model, print_fn=lambda line: None, **KL, **arguments)


def _with_lora(model):
    """Enable Keras's low-rank updates in the dense layers of `model`, and return it."""
    for layer in model._flatten_layers():
        if isinstance(layer, (layers.Dense, layers.EinsumDense)):
            layer.enable_lora(RANK)
    return model


OURS = {
    "keras.layers": lambda model: model,
    **{
        f"to_variational, {estimator}": functools.partial(_converted, layers=KERNELS, estimator=estimator)
        for estimator in ("local_reparameterization", "flipout", "reparameterization")
    },
    "to_variational, all layers": _converted,
    "Variational(network)": lambda model: kv.Variational(model, **KL),
}
LOW_RANK = {
    "enable_lora(8)": _with_lora,
    "to_variational(rank=8)": functools.partial(_converted, layers=ADAPTED, rank=RANK),
}


def conversions(name):
    """Return {way: function from a Keras network to the model to fine-tune}, in the order of the table."""
    return {**OURS, **(LOW_RANK if name == ENCODER else {})}


# Steps


def keras_fine_tuning(model, x, y, jit=False):
    """Return the training step of the model and its number of trainable parameters."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    step = speed.keras_step(model, keras.optimizers.Adam(1e-4), loss, x, y, jit)
    return step, sum(int(np.prod(each.shape)) for each in model.trainable_weights)


def ways(name, sizes, jit):
    """Return {way: (function that builds a network, its conversion, function from model and data to its step)}.

    The rows of PyTorch are not compiled, so `jit` leaves them out.
    """
    make = functools.partial(keras_network, name, sizes)
    tune = functools.partial(keras_fine_tuning, jit=jit)
    found = {way: (make, convert, tune) for way, convert in conversions(name).items()}
    if not jit and peers.installed("torch"):
        of_torch = peers.torch_resnet if name == RESNET else peers.torch_encoder
        make = functools.partial(of_torch, *sizes, classes=CLASSES)
        for way, convert in peers.torch_conversions().items():
            found[way] = make, convert, peers.torch_fine_tuning
    return found


# Measurements in a separate process


def alone(name, sizes, way, jit):
    """Measure the seconds and MB of the conversion of a network and of its first five steps."""
    make, convert, tune = ways(name, sizes, jit)[way]
    network = make()
    taken = {}

    def conversion():
        begin = time.perf_counter()
        taken["model"] = convert(network)
        taken["conversion"] = time.perf_counter() - begin

    def training():
        step, _ = tune(taken["model"], *data(name, sizes))
        begin = time.perf_counter()
        step()
        taken["first"] = time.perf_counter() - begin
        for _ in range(4):
            step()

    converting, stepping = speed.grown(conversion), speed.grown(training)
    return {
        "conversion s": taken["conversion"],
        "first step s": taken["first"],
        "conversion MB": converting["MB"],
        "steps MB": stepping["MB"],
        "peak MB": stepping["peak MB"],
    }


# Tables and command line


def base(way):
    """Return the baseline of a way: the unconverted network of its framework, or `enable_lora` for low rank."""
    if way in LOW_RANK:
        return "enable_lora(8)"
    return "torch.nn" if way == "torch.nn" or "bayesian-torch" in way else "keras.layers"


def rows(name, sizes, options, jit):
    batch = data(name, sizes)
    made = {way: tune(convert(make()), *batch) for way, (make, convert, tune) in ways(name, sizes, jit).items()}
    seconds = common.measure({way: step for way, (step, _) in made.items()}, options.repeats, warm=True)
    found = {}
    for first in dict.fromkeys(map(base, made)):  # with which `summary` compares the others
        found.update(speed.summary({way: seconds[way] for way in made if base(way) == first}))
    for way, (_, parameters) in made.items():
        found[way]["parameters"] = parameters
    del made
    for way in [*found][:: 6 if options.quick else 1]:
        found[way].update(speed.apart(alone, name, sizes, way, jit))
    return found


COLUMNS = {"parameters": ",.0f", "ms": ".1f", "ratio": ".2f", "conversion s": ".2f", "first step s": ".1f"}
COLUMNS |= {"conversion MB": ".0f", "steps MB": ".0f", "peak MB": ".0f"}


def show(title, found):
    print(f"\n{title:<46}" + "".join(f"{column:>15}" for column in COLUMNS))
    for way, row in found.items():
        cells = [format(row[column], form) if column in row else "" for column, form in COLUMNS.items()]
        print(f"{way:<46}" + "".join(f"{cell:>15}" for cell in cells), flush=True)


def main():
    parser = common.parser(__doc__, learns=False)
    common.add_places(parser)
    parser.add_argument("--networks", nargs="+", choices=[*FULL], default=[*FULL])
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each model")
    parser.add_argument("--jit", choices=["off", "on"], nargs="+", default=["off"], help="whether to compile with XLA")
    options = parser.parse_args()
    common.start_anew(options.backend, options.device)
    if options.quick:
        options.repeats, options.jit, options.networks = 2, ["off"], [ENCODER]
    print(*(f"{key}: {value}" for key, value in common.about().items()), sep="\n")
    result = {}
    for name in options.networks:
        for jit in options.jit:
            title = f"{TITLES[name]}, {keras.backend.backend()}, jit_compile={jit == 'on'}"
            result[title] = rows(name, (QUICK if options.quick else FULL)[name], options, jit == "on")
            show(title, result[title])
            common.keep(options.out, {"repeats": options.repeats, "steps": result})


if __name__ == "__main__":
    main()
