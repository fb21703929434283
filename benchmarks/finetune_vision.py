"""Convert, fine-tune, prune, compact and export a trained ResNet-20; measure its error, size and speed.

    KERAS_BACKEND=jax python benchmarks/finetune_vision.py --data DIR --models MODELS --out FILE.json
    python benchmarks/finetune_vision.py --data DIR --models MODELS --out FILE.json

The first command trains, on a GPU if there is one, and saves every network in MODELS. The second loads them from there
and measures what the first cannot: the ONNX and LiteRT files, which Keras exports only with the TensorFlow backend, and
the prediction time on another machine.

The benchmark trains an ordinary ResNet-20 (He et al., 2016, with projections where shapes change) on Fashion-MNIST,
with SGD with momentum and a cosine schedule of the learning rate. Images are shifted by up to two pixels and mirrored
half of the time. Per seed, all other networks start from this one, the row "plain":

- weights: `to_variational` with a prior over single weights (`--prior`), `fit` with `ELBO`, `select_threshold`,
  `prune`, then more epochs at a low learning rate with the noise of the kept weights.
- filters: the same with `ARD(group_axis=-2)`, which prunes a filter when the next convolution does not read it. With
  `--group-axis -1` a filter without kept weights is a constant after BatchNormalization. If that constant is not 0, it
  affects the borders of the next convolution's output, so `compact` cannot remove the filter.
- both: the compacted network of "filters", converted again with the prior over single weights.
- magnitude, as weights / as both: magnitude pruning of the plain network over the same number of epochs, down to the
  number of weights that "weights" or "both" keeps. Of w weights, left + (w - left)·(1 - t)³ are kept, where t rises
  from 0 to 1 over the first two thirds of the steps (Zhu, Gupta, 2017, https://arxiv.org/abs/1710.01878).
- magnitude, as filters: the same for the filters of the first convolution of every block, by their L1 norm, with the
  same share in each block (Li et al., 2017, https://arxiv.org/abs/1608.08710). The compacted network has at most as
  many parameters as that of "filters".

`select_threshold` uses the last twelfth of the training images. `--validation` evaluates on the last sixth of the
training images instead of the test images. Weights are counted in kernels; weights left are the nonzero ones of the
compacted network.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import sys
import tempfile

import common
import export
import images
import keras
import mnist_lenet
import numpy as np
from keras import layers, ops

import keras_vdrop as kv
from keras_vdrop.costs import file_sizes
from keras_vdrop.scores import calibration

FILTERS, BLOCKS = (16, 32, 64), 3
# Epochs of the plain training, of fine-tuning, and of recovery after pruning.
EPOCHS = (60, 40, 20)
BATCH, SHIFT = 128, 2
# Learning rates of the same three phases.
RATES = (0.1, 1e-3, 3e-4)
WEIGHT_DECAY = 5e-4
OURS = ("weights", "filters", "both")
ROWS = ("plain", *OURS, *(f"magnitude, as {name}" for name in OURS))
# Number of images from which the statistics of BatchNormalization are computed again.
REFRESHING = 2048
# Number of images on which the outputs of an export runtime are compared with Keras's.
EXPORTED = 64


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings for fine-tuning and pruning a trained network.

    Attributes:
        temperature: Factor on the KL; 1 is the ELBO.
        tolerance: Accuracy on the validation images that pruning may cost, before the recovery epochs.
    """

    temperature: float
    tolerance: float


RECIPES = {"weights": Recipe(0.3, 0.01), "filters": Recipe(0.3, 0.02), "both": Recipe(0.3, 0.01)}


# Networks


def network(filters, blocks, convolution=layers.Conv2D, dense=layers.Dense):
    """Build a ResNet from images to ten logits; `filters` has one count per stage, of `blocks` blocks each."""

    def normalized(h, count, size, name, strides=1):
        arguments = {"padding": "same", "use_bias": False, "kernel_initializer": "he_normal", "name": name}
        h = convolution(count, size, strides=strides, **arguments)(h)
        return layers.BatchNormalization(momentum=0.9, name=f"{name}_normalization")(h)

    x = keras.Input((28, 28, 1))
    h = layers.ReLU()(normalized(x, filters[0], 3, "stem"))
    for stage, count in enumerate(filters, start=1):
        for block in range(1, blocks + 1):
            name = f"stage{stage}_block{block}"
            strides = 2 if stage > 1 and block == 1 else 1
            inner = layers.ReLU()(normalized(h, count, 3, f"{name}_first", strides))
            inner = normalized(inner, count, 3, f"{name}_second")
            shortcut = h if strides == 1 else normalized(h, count, 1, f"{name}_shortcut", strides)
            h = layers.ReLU()(layers.Add()([shortcut, inner]))
    return keras.Model(x, dense(10, name="logits")(layers.GlobalAveragePooling2D()(h)))


def kernels(model):
    """Return {layer name: kernel} of the layers that have a kernel."""
    return {layer.name: ops.convert_to_numpy(layer.kernel) for layer in model.layers if hasattr(layer, "kernel")}


class ShiftAndFlip(layers.Layer):
    """Shift each training image by up to `pixels` along both axes, filled with zeros, and mirror half of the images."""

    def __init__(self, pixels, **kwargs):
        super().__init__(**kwargs)
        self.pixels = pixels
        self.seed_generator = keras.random.SeedGenerator()

    def call(self, x, training=False):
        if not training:
            return x
        count, height, width = ops.shape(x)[:3]
        rows, columns = ops.arange(height)[None], ops.arange(width)[None]
        mirrored = keras.random.uniform((count, 1), seed=self.seed_generator) < 0.5
        columns = ops.where(mirrored, width - 1 - columns, columns)
        x = ops.pad(x, ((0, 0), (self.pixels, self.pixels), (self.pixels, self.pixels), (0, 0)))
        x = ops.take_along_axis(x, (rows + self._offset(count))[:, :, None, None], axis=1)
        return ops.take_along_axis(x, (columns + self._offset(count))[:, None, :, None], axis=2)

    def _offset(self, count):
        return keras.random.randint((count, 1), 0, 2 * self.pixels + 1, dtype="int32", seed=self.seed_generator)


# Learning


def load(options):
    """Return {"train", "validation", "test": (x, y)}; "validation" is the last twelfth of the training images.

    The training set holds only whole batches. JAX would compile a smaller last batch separately, and in a graph of
    TensorFlow 2.21 on a CPU, gradients of these convolutions on alternating batch sizes corrupt memory.
    """
    data = images.load(options.data, None if options.quick else "fashion_mnist", options.validation)
    x, y = data["train"]
    cut = len(x) * 11 // 12
    first = cut if options.examples is None else min(options.examples, cut)
    first -= first % BATCH
    return {"train": (x[:first], y[:first]), "validation": (x[cut:], y[cut:]), "test": data["test"]}


def learner(model, optimizer, options):
    """Return the compiled model with `ShiftAndFlip` before it; it can be fitted several times."""
    moving = keras.Sequential([keras.Input(model.input_shape[1:]), ShiftAndFlip(SHIFT), model])
    # Run twenty steps per call: on few cores TensorFlow's steps otherwise wait for its input pipeline.
    moving.compile(optimizer, _loss(), steps_per_execution=20, jit_compile=options.jit)
    return moving


def fit(learner, data, epochs, rate, callbacks=()):
    """Fit with a learning rate that falls from epoch to epoch along a cosine, to almost 0."""
    falling = keras.callbacks.LearningRateScheduler(lambda epoch: rate * 0.5 * (1 + math.cos(math.pi * epoch / epochs)))
    learner.fit(*data["train"], batch_size=BATCH, epochs=epochs, callbacks=[falling, *callbacks], verbose=0)


def _loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def learn_plain(data, options):
    model = network(options.filters, options.blocks)
    sgd = keras.optimizers.SGD(RATES[0], momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)
    fit(learner(model, sgd, options), data, options.epochs[0], RATES[0])
    return model


def tune(trained, prior, recipe, data, options):
    """Convert a trained network, fine-tune it with the ELBO, prune it, and return the variational network."""
    model = kv.to_variational(trained, prior=prior, print_fn=lambda line: None)
    learning = learner(model, keras.optimizers.Adam(), options)
    elbo = functools.partial(kv.ELBO, len(data["train"][0]), temperature=recipe.temperature)
    fit(learning, data, options.epochs[1], RATES[1], [elbo()])
    model.compile(loss=_loss(), metrics=["accuracy"])
    refresh = functools.partial(kv.update_batch_normalization, x=seen(data), batch_size=REFRESHING)
    tolerance = recipe.tolerance
    choice = kv.select_threshold(model, *data["validation"], tolerance, batch_size=1000, prepare=refresh)
    print(choice, flush=True)
    kv.prune(model, choice.threshold if choice.chosen else None)
    fit(learning, data, options.epochs[2], RATES[2], [elbo(start_epoch=0, warmup_epochs=0)])
    print(kv.prune(model), flush=True)  # weights that became noise in the recovery epochs
    return model


def seen(data):
    """Return the first `REFRESHING` training images, shifted and mirrored as in training."""
    return ops.convert_to_numpy(ShiftAndFlip(SHIFT)(data["train"][0][:REFRESHING], training=True))


# Pruning by magnitude


class MaskedConv2D(layers.Conv2D):
    """A convolution with kernel · mask."""

    def build(self, input_shape):
        super().build(input_shape)
        self.mask = self.add_weight(name="mask", shape=self.kernel.shape, initializer="ones", trainable=False)

    def convolution_op(self, x, kernel):
        return super().convolution_op(x, kernel * self.mask)


class MaskedDense(layers.Dense):
    """A dense layer: x·(kernel · mask) + bias."""

    def build(self, input_shape):
        super().build(input_shape)
        self.mask = self.add_weight(name="mask", shape=self.kernel.shape, initializer="ones", trainable=False)

    def call(self, x):
        return ops.matmul(x, self.kernel * self.mask) + self.bias


class Pruning(keras.callbacks.Callback):
    """Set the masks of a network every `every` steps, for the last time after two thirds of all steps.

    Args:
        network: The network, of masked layers.
        masks: Function from ({name: kernel}, share) to {name: mask}. `share` is the part of the weights or filters to
            prune that is still kept; it falls from 1 to 0.
        epochs: Int, the epochs of `fit`.
        every: Int, the number of steps between two updates.
    """

    def __init__(self, network, masks, epochs, every=100):
        super().__init__()
        self.network, self.masks, self.epochs, self.every = network, masks, epochs, every
        self.epoch = self.next = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        steps = self.params["steps"]
        ramp = max(2 * self.epochs * steps // 3, 1)
        step = self.epoch * steps + batch + 1
        if self.next is None or step < min(self.next, ramp):
            return
        self.next = None if step >= ramp else step + self.every
        learner = self.model  # reading it makes JAX's trainer sync its state with the variables
        del learner
        found = self.masks(masked_kernels(self.network), max(1 - step / ramp, 0.0) ** 3)
        for name, mask in found.items():
            self.network.get_layer(name).mask.assign(mask)


def masked_kernels(model):
    """Return {layer name: kernel · mask} of a network of masked layers."""
    masks = {name: ops.convert_to_numpy(model.get_layer(name).mask) for name in kernels(model)}
    return {name: kernel * masks[name] for name, kernel in kernels(model).items()}


def largest(left):
    """Return a function for `Pruning` that keeps the largest weights over all layers, `left` of them at the end."""

    def masks(values, share):
        sizes = {name: np.abs(value) for name, value in values.items()}
        every = np.sort(np.concatenate([size.ravel() for size in sizes.values()]))[::-1]
        smallest = every[max(int(left + (len(every) - left) * share), 1) - 1]
        return {name: (size >= smallest).astype("float32") for name, size in sizes.items()}

    return masks


def strongest(left):
    """Return a function for `Pruning` that keeps the share `left` of each block's first filters, by L1 norm."""

    def masks(values, share):
        found = {}
        for name in values:
            if name.endswith("_first"):
                norms = np.abs(values[name]).sum((0, 1, 2))
                count = kept_of(len(norms), left + (1 - left) * share)
                kept = (norms >= np.sort(norms)[-count]).astype("float32")
                second = name.replace("_first", "_second")
                found[name] = np.broadcast_to(kept, values[name].shape)
                found[second] = np.broadcast_to(kept[:, None], values[second].shape)
        return found

    return masks


def kept_of(count, share):
    return max(round(count * share), 1)


def share_of(model, parameters):
    """Return the largest share of filters, in the first layer of every block, with at most `parameters` parameters."""

    def parameters_at(share):
        total = model.count_params()
        for layer in model.layers:
            if layer.name.endswith("_first"):
                inputs, count = layer.kernel.shape[-2:]
                outputs = model.get_layer(layer.name.replace("_first", "_second")).filters
                # A filter takes its own weights, those of the next layer that read it, and four of its normalization.
                total -= (count - kept_of(count, share)) * (9 * inputs + 9 * outputs + 4)
        return total

    widest = max(layer.filters for layer in model.layers if layer.name.endswith("_first"))
    shares = [count / widest for count in range(widest, 0, -1)]
    for share in shares:
        if parameters_at(share) <= parameters:
            return share
    print(f"With one filter in each block, {parameters_at(share):,} parameters are kept, more than {parameters:,}.")
    return share


def prune_by_magnitude(trained, masks, data, options):
    """Return a copy of the trained network, trained further while it is pruned."""
    masked = network(options.filters, options.blocks, MaskedConv2D, MaskedDense)
    _copy(trained, masked)
    epochs = options.epochs[1] + options.epochs[2]
    fit(learner(masked, keras.optimizers.Adam(), options), data, epochs, RATES[1], [Pruning(masked, masks, epochs)])
    model = network(options.filters, options.blocks)
    _copy(masked, model)
    for name, kernel in masked_kernels(masked).items():
        model.get_layer(name).kernel.assign(kernel)
    return model


def _copy(source, target):
    """Copy the weights that both networks have. Masks are the last weights of their layer, so `zip` skips them."""
    for layer in source.layers:
        if layer.weights:
            for variable, value in zip(target.get_layer(layer.name).weights, layer.get_weights()):
                variable.assign(value)


# Saved networks

# The options that a trained network depends on, besides its name, its seed and `--validation`, which its file names.
TRAINING_OPTIONS = ("quick", "prior", "group_axis", "temperature", "epochs", "filters", "blocks", "examples")


def check_models(options):
    """Record the training options in the folder of saved networks. Exit if they differ from those recorded there."""
    if options.models is None:
        return
    path = options.models / "options.json"
    recipe = {name: getattr(options, name) for name in TRAINING_OPTIONS}
    if not path.is_file():
        options.models.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(recipe, indent=1) + "\n")
    elif (saved := json.loads(path.read_text())) != recipe:
        sys.exit(f"{options.models} contains networks of other options: {saved}. Pass another folder.")


# Measurements


def scores(probability, y):
    return {
        "error": 100 * (1 - calibration.accuracy(probability, y)),
        "nll": calibration.negative_log_likelihood(probability, y),
        "ece": 100 * calibration.expected_calibration_error(probability, y),
    }


def probability(model, x):
    return ops.convert_to_numpy(ops.softmax(model.predict(x, batch_size=500, verbose=0)))


def sizes(small):
    """Return the size of a Keras network: nonzero kernel weights, parameters, multiply-adds, bytes, filters."""
    values = kernels(small)
    products = {name: int(np.prod(small.get_layer(name).output.shape[1:-1])) for name in values}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.keras")
        small.save(path)
        stored, gzipped = file_sizes(path)
    return {
        "left": left_in(small),
        "parameters": small.count_params(),
        "multiply_adds": sum(products[name] * value.size for name, value in values.items()),
        "bytes": stored,
        "gzipped": gzipped,
        "filters": {name: value.shape[-1] for name, value in values.items()},
    }


def left_in(small):
    return sum(int(np.count_nonzero(value)) for value in kernels(small).values())


def exported(small, x):
    """Return, per export format, the file sizes in bytes and the largest difference between its outputs and Keras's."""
    if keras.backend.backend() != "tensorflow":
        print("not exported: Keras writes ONNX and LiteRT only with the TensorFlow backend")
        return {}
    formats = {"onnx": export.save_onnx, "litert": export.save_litert}
    expected = small.predict(x[:EXPORTED], verbose=0)
    return {name: export.measure(small, expected, x[:EXPORTED], save) for name, save in formats.items()}


class Networks:
    """The networks of one seed, by row name. Each is trained on first use, together with those that it starts from.

    Args:
        seed: Int.
        data: The result of `load`.
        options: The command-line options. Networks are saved in and loaded from the folder `options.models`, if given.
    """

    def __init__(self, seed, data, options):
        self.seed, self.data, self.options = seed, data, options
        self._known, self._small = {}, {}

    def __getitem__(self, name):
        if name not in self._known:
            self._known[name] = self._kept(name)
        return self._known[name]

    def small(self, name):
        """Return the compacted network, for predictions without noise."""
        if name not in self._small:
            self._small[name] = kv.compact(self[name], x=self.data["test"][0])
            if name in OURS:
                kv.update_batch_normalization(self._small[name], seen(self.data), REFRESHING)
        return self._small[name]

    def _kept(self, name):
        folder = self.options.models
        if folder is None:
            return self._made(name)
        judged = "_validation" if self.options.validation else ""
        path = folder / f"{name.replace(', ', '_').replace(' ', '_')}{judged}_{self.seed}.keras"
        if not path.is_file():
            self._made(name).save(path)
        return keras.saving.load_model(path, compile=False)

    def _made(self, name):
        keras.utils.set_random_seed(self.seed)
        data, options = self.data, self.options
        if name == "plain":
            return learn_plain(data, options)
        if name in OURS:
            recipe = RECIPES[name]
            if options.temperature is not None:
                recipe = dataclasses.replace(recipe, temperature=options.temperature)
            prior = kv.priors.ARD(group_axis=options.group_axis) if name == "filters" else options.prior
            return tune(self.small("filters") if name == "both" else self["plain"], prior, recipe, data, options)
        ours, trained = name.removeprefix("magnitude, as "), self["plain"]
        masks = largest(kv.sparsity(self[ours]).left)
        if ours == "filters":
            masks = strongest(share_of(trained, self.small(ours).count_params()))
        return prune_by_magnitude(trained, masks, data, options)


def learn(name, seed, networks, options):
    """Return the row of results of one network with one seed."""
    of_seed = networks(seed)
    model, (x, y) = of_seed[name], of_seed.data["test"]
    small = of_seed.small(name)
    row = {
        **scores(probability(small, x), y),
        **sizes(small),
        "export": {} if name.startswith("magnitude") else exported(small, x),
    }
    if name != "plain":
        batches = {"batches": options.batches, "repeats": options.repeats}
        row["speed"] = mnist_lenet.speed(of_seed["plain"], small, x, **batches)
    if name in OURS:
        drawn = kv.MonteCarlo(model, options.draws, likelihood="categorical", seed=seed)
        row["drawn"] = scores(drawn.predict(x, batch_size=500, verbose=0)["probability"], y)
    return row


def show(rows, options):
    """Print the table."""
    batches = [str(batch) for batch in options.batches]
    head = ("error %", "NLL", "ECE %", "kept weights", "ratio", "parameters", "products", "bytes", "gzipped")
    print(f"\n{'':<24}" + "".join(f"{each:>15}" for each in (*head, *(f"times, {each}" for each in batches))))
    plain = {row["seed"]: row["left"] for row in rows.get("plain", [])}
    for name, each in rows.items():
        if not each:
            continue
        cells = [common.spread([row["error"] for row in each])]
        cells += [f"{np.mean([row[key] for row in each]):.3f}" for key in ("nll", "ece")]
        cells += [f"{np.mean([row['left'] for row in each]):,.0f}"]
        cells += [f"{np.mean([plain[row['seed']] / row['left'] for row in each if row['seed'] in plain]):.1f}"]
        cells += [
            f"{np.mean([row[k] for row in each]):,.0f}" for k in ("parameters", "multiply_adds", "bytes", "gzipped")
        ]
        cells += [common.spread([row["speed"][b]["times"] for row in each]) for b in batches if "speed" in each[0]]
        print(f"{name:<24}" + "".join(f"{cell:>15}" for cell in cells))
        if "drawn" in each[0]:
            cells = [f"{np.mean([row['drawn'][key] for row in each]):.3f}" for key in ("error", "nll", "ece")]
            print(f"{'  mean of draws':<24}" + "".join(f"{cell:>15}" for cell in cells))
        for batch, speed in each[0].get("speed", {}).items():
            ms = {key: np.mean([row["speed"][batch]["ms"][key] for row in each]) for key in speed["ms"]}
            print(f"  {batch} images: {ms['dense']:.2f} ms before, {ms['small']:.2f} ms after")
        for kind, found in each[0]["export"].items():
            print(f"  {kind}: {found['bytes']:,} bytes, {found['gzipped']:,} gzipped, off by {found['deviation']:.1e}")
        print("  filters: " + "-".join(str(count) for count in each[0]["filters"].values()))


def main():
    parser = common.parser(__doc__)
    common.add_places(parser)
    parser.add_argument(
        "--models", type=pathlib.Path, help="folder in which trained networks are saved and found again"
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS])
    parser.add_argument(
        "--prior", choices=["ard", "log_uniform"], default="log_uniform", help="prior of single weights"
    )
    parser.add_argument("--group-axis", type=int, choices=[-1, -2], default=-2, help="axis of the groups of filters")
    parser.add_argument("--temperature", type=float, help="temperature of the KL in every row, instead of the recipe's")
    parser.add_argument("--epochs", nargs=3, type=int, metavar=("LEARN", "TUNE", "RECOVER"), default=[*EPOCHS])
    parser.add_argument("--filters", nargs="+", type=int, default=[*FILTERS], help="number of filters in each stage")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="number of blocks in each stage")
    parser.add_argument("--examples", type=int, help="number of training images (default: all)")
    parser.add_argument("--draws", type=int, default=20, help="draws for the scored predictions")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 128], help="batch sizes that are timed")
    parser.add_argument("--repeats", type=int, default=100, help="number of repetitions of each timing")
    parser.add_argument("--validation", action="store_true", help="score on 10,000 of the training images")
    parser.add_argument(
        "--jit", action=argparse.BooleanOptionalAction, default="auto", help="compile the training step with XLA"
    )
    options = parser.parse_args()
    common.start_anew(options.backend, options.device)
    if options.quick:
        options.seeds, options.epochs, options.filters, options.blocks = 1, [1, 1, 1], [4, 8], 1
        options.draws, options.repeats, options.temperature = 3, 3, 1e-4
        options.rows = [name for name in options.rows if not name.endswith("weights")]  # "both" runs the same code
    check_models(options)
    networks = functools.cache(functools.partial(Networks, data=load(options), options=options))
    rows = {}
    common.learn_rows(options.rows, options, functools.partial(learn, networks=networks, options=options), rows)
    show(rows, options)


if __name__ == "__main__":
    main()
