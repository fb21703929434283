"""Pruning LeNet-300-100 and LeNet-5-Caffe on MNIST or Fashion-MNIST: sparsity against test error.

    python benchmarks/mnist_lenet.py --net 300-100 --prior ard --data DIR --out benchmarks/results/mnist_300-100.json

Three networks train with each seed: "dense", of Keras's own layers; "ours"; and "magnitude", a dense network whose
smallest weights are pruned during training until it keeps as many as ours. Our network is pruned in stages. In each
stage, a high weight of the KL prunes weights, and then a low one lets the kept weights recover. The recipe for
LeNet-300-100 was tuned on the last 10,000 training images (`--validation`), never on the test images. The recipe for
LeNet-5 is a shortened version of it, checked by one such trial. The reported networks train on all 60,000 images,
without augmentation.

With `--structured`, an ARD prior keeps or prunes the outgoing weights of a pixel, channel or unit as a group, under a
lower weight of the KL (tuned in the same way). Tensors then shrink, and the network that `compact` returns is timed
against the dense one. This mode leaves out "magnitude".

DIR holds mnist.npz and fashion_mnist.npz with x_train, y_train, x_test, y_test: images of 28×28 bytes, and labels.
Without a data folder, mnist.npz is read from the cache folder of `keras.datasets`.
"""

import dataclasses
import functools
import pathlib
import tempfile

import common
import images
import keras
import numpy as np
from keras import layers

import keras_vdrop as kv
from keras_vdrop.costs import file_sizes

BATCH = 100

# Test error in %, and ratio of all weights to the kept ones, without biases.
PUBLISHED = {
    "300-100": {
        "Han et al., 2015, pruning": (1.59, 12),
        "Ullrich et al., 2017, soft weight sharing": (1.94, 23),
        "Guo et al., 2016, network surgery": (1.99, 56),
        "Molchanov et al., 2017, sparse variational dropout": (1.92, 68),
    },
    "5-caffe": {
        "Han et al., 2015, pruning": (0.77, 12),
        "Guo et al., 2016, network surgery": (0.91, 111),
        "Louizos et al., 2017, Bayesian compression, GNJ": (1.0, 108),
        "Louizos et al., 2017, Bayesian compression, GHS": (1.0, 156),
        "Ullrich et al., 2017, soft weight sharing": (0.97, 200),
        "Molchanov et al., 2017, sparse variational dropout": (0.75, 280),
        "Li et al., 2018, OLMP": (0.91, 298),
        "Xiao et al., 2019, AutoPrune, its error not told": (None, 310),
    },
}


@dataclasses.dataclass(frozen=True)
class Round:
    """A number of training epochs, followed by pruning.

    Attributes:
        epochs: The number of epochs.
        temperature: The factor on the KL; 1 is the ELBO.
        ramp: The number of epochs over which the weight of the KL rises from 0 to its full value.
        threshold: The log alpha above which weights are pruned at the end.
        flat: The fraction of training after which Adam's rate starts to fall linearly to 0.
    """

    epochs: int
    temperature: float
    ramp: int = 0
    threshold: float = 0.0
    flat: float = 0.5


STAGES = {
    "300-100": [
        [Round(100, 1.0, ramp=40, threshold=2.0), Round(50, 3.0, ramp=20, threshold=1.0, flat=0.6), Round(40, 0.3)],
        [Round(50, 4.5, ramp=20, flat=0.6), Round(40, 0.3)],
    ],
    "5-caffe": [
        [Round(20, 1.0, ramp=8, threshold=2.0), Round(15, 3.0, ramp=6, threshold=1.0, flat=0.6), Round(6, 0.3)],
        [Round(12, 5.0, ramp=6, flat=0.6), Round(6, 0.3)],
    ],
}

STRUCTURED = {
    "300-100": [
        [Round(100, 0.5, ramp=40, threshold=5.0), Round(40, 0.1, threshold=5.0)],
        [Round(50, 1.5, ramp=20, threshold=5.0), Round(40, 0.1, threshold=5.0)],
    ],
    "5-caffe": [[Round(20, 0.5, ramp=8, threshold=5.0), Round(10, 0.1, threshold=5.0)]],
}


# These settings prune most: log variances that move slowly, and independent noise at each position. Good Monte Carlo
# predictions need other settings.
SPARSIFIER = {"initial_log_variance": -8.0, "log_variance_rate": 1.0, "estimator": "local_reparameterization"}


# Networks


def network(net, dense, convolution):
    """Build LeNet-300-100, or Caffe's LeNet-5, from images to ten logits, with the given layer classes."""
    if net == "300-100":
        features = [layers.Flatten(), dense(300, activation="relu", name="dense1")]
        hidden = dense(100, activation="relu", name="dense2")
    else:
        features = [
            convolution(20, 5, name="convolution1"),
            layers.MaxPooling2D(2),
            convolution(50, 5, name="convolution2"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
        ]
        hidden = dense(500, activation="relu", name="dense1")
    return keras.Sequential([keras.Input((28, 28, 1)), *features, hidden, dense(10, name="logits")])


def dense_network(net):
    return network(net, layers.Dense, layers.Conv2D)


def variational_network(net, prior):
    arguments = {"kernel_prior": prior, **SPARSIFIER}
    return network(net, *(functools.partial(cls, **arguments) for cls in (kv.VariationalDense, kv.VariationalConv2D)))


# Training


@keras.saving.register_keras_serializable(package="benchmarks")
class FlatThenFalling(keras.optimizers.schedules.LearningRateSchedule):
    """Learning rate that is constant up to step `flat`, and then falls linearly to 0 at step `end`."""

    def __init__(self, rate, flat, end):
        self.rate, self.flat, self.end = rate, flat, end

    def __call__(self, step):
        left = (self.end - keras.ops.cast(step, "float32")) / (self.end - self.flat)
        return self.rate * keras.ops.clip(left, 0.0, 1.0)

    def get_config(self):
        return {"rate": self.rate, "flat": self.flat, "end": self.end}


def fit(model, data, epochs, flat=0.5, callbacks=(), steps_at_once=20):
    """Train by Adam, running `steps_at_once` steps per call.

    On few cores, TensorFlow's steps wait for its input pipeline if callbacks run after each of them.
    """
    x, y = data["train"]
    steps = epochs * -(-len(x) // BATCH)
    adam = keras.optimizers.Adam(FlatThenFalling(1e-3, int(flat * steps), steps))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(adam, loss, steps_per_execution=steps_at_once)
    model.fit(x, y, batch_size=BATCH, epochs=epochs, callbacks=list(callbacks), verbose=0)


def learn_dense(options, data, left=None):
    """Train the dense network; if `left` is given, prune it by magnitude to that many weights."""
    model = dense_network(options.net)
    epochs = options.epochs or STAGES[options.net][0][0].epochs
    steps = epochs * -(-len(data["train"][0]) // BATCH)
    pruning = [] if left is None else [MagnitudePruning(left, steps)]
    fit(model, data, epochs, callbacks=pruning, steps_at_once=1 if pruning else 20)
    return model


def learn_stages(options, data):
    """Train our network; yield it after each stage."""
    prior = kv.priors.ARD(group_axis=-2) if options.structured else options.prior
    model = variational_network(options.net, prior)
    for rounds in (STRUCTURED if options.structured else STAGES)[options.net]:
        for each in rounds:
            epochs = options.epochs or each.epochs
            ramp = min(each.ramp, epochs - 1)
            elbo = kv.ELBO(len(data["train"][0]), warmup_epochs=ramp, temperature=each.temperature)
            fit(model, data, epochs, each.flat, [elbo])
            print(kv.prune(model, each.threshold), f"\n{error(model, data):.2f} % error", flush=True)
        yield model


class MagnitudePruning(keras.callbacks.Callback):
    """Prune a network of Keras layers by magnitude, further every `every` steps.

    Of w weights, the left + (w − left)·(1 − t)³ largest are kept, where t rises from 0 to 1 over the first two thirds
    of the steps.

    Reference:
        To Prune, or Not to Prune, Zhu, Gupta, 2017, https://arxiv.org/abs/1710.01878
    """

    def __init__(self, left, steps, every=100):
        super().__init__()
        self.left, self.ramp, self.every = left, max(2 * steps // 3, 1), every
        self.step, self.masks = 0, None

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        if self.step == self.ramp or (self.step < self.ramp and self.step % self.every == 0):
            self.masks = self._largest((1 - self.step / self.ramp) ** 3)
        if self.masks is not None:
            for kernel, mask in zip(self._kernels(), self.masks):
                kernel.assign(kernel * mask)

    def _kernels(self):
        return [layer.kernel for layer in self.model.layers if layer.weights]

    def _largest(self, share):
        sizes = [np.abs(keras.ops.convert_to_numpy(kernel)) for kernel in self._kernels()]
        every = np.sort(np.concatenate([size.ravel() for size in sizes]))[::-1]
        smallest = every[int(self.left + (len(every) - self.left) * share) - 1]
        return [(size >= smallest).astype("float32") for size in sizes]


# Figures of a trained network


def error(model, data):
    """Return the error on the test part of the data, in per cent."""
    x, y = data["test"]
    return 100 * float(np.mean(model.predict(x, batch_size=1000, verbose=0).argmax(-1) != y))


def row_of(model, data):
    """Return the error, the numbers of nonzero weights, and the shapes and file sizes of the `compact` network."""
    small = kv.compact(model, x=data["test"][0])
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.keras")
        small.save(path)
        plain, gzipped = file_sizes(path)
    return {
        "error": error(model, data),
        "layers": {name: (kernel.size, int(np.count_nonzero(kernel))) for name, (kernel, _) in _weights(model).items()},
        "biases": [bias.size for _, bias in _weights(model).values()],
        "biases_left": [int(np.count_nonzero(bias)) for _, bias in _weights(small).values()],
        "shapes": [kernel.shape for kernel, _ in _weights(small).values()],
        "bytes": plain,
        "gzipped": gzipped,
    }


def _weights(model):
    """Return {layer name: [kernel, bias]} of the deterministic network, for layers with weights."""
    weighted = [layer for layer in kv.to_deterministic(model).layers if layer.weights]
    return {layer.name: [keras.ops.convert_to_numpy(each) for each in layer.weights] for layer in weighted}


def weights_of(row):
    """Return the number of all weights and of kept weights of a row, without biases."""
    return [sum(counts) for counts in zip(*row["layers"].values())]


def ratios(row):
    """Return the ratio of all weights to the kept ones, without and with biases."""
    weights, left = weights_of(row)
    return weights / left, (weights + sum(row["biases"])) / (left + sum(row["biases_left"]))


# Time


def compiled(model):
    """Compile the network into a function of an array that waits for its result."""
    if keras.backend.backend() == "jax":
        import jax

        function = jax.jit(lambda x: model(x, training=False))
        return lambda x: function(x).block_until_ready()
    import tensorflow as tf

    function = tf.function(lambda x: model(x, training=False), jit_compile=True)
    return lambda x: function(x).numpy()


def speed(dense, small, x, batches=(10_000, 128), repeats=30):
    """Time the small network alternately with the dense one; return median times and speed-up by batch size."""
    faster = {}
    for batch in batches:
        rows = keras.ops.convert_to_tensor(np.resize(x, (batch, *x.shape[1:])))
        steps = {name: functools.partial(compiled(model), rows) for name, model in (("dense", dense), ("small", small))}
        seconds = common.measure(steps, repeats)
        faster[str(batch)] = {
            "ms": {name: 1e3 * float(np.median(each)) for name, each in seconds.items()},
            "times": float(np.median(seconds["dense"] / seconds["small"])),
        }
    return faster


# Results


def learn(name, seed, data, options, rows):
    """Train and score one network with one seed; "magnitude" reads the row of "ours" with that seed from `rows`."""
    keras.utils.set_random_seed(seed)
    if name == "dense":
        return row_of(learn_dense(options, data), data)
    if name == "magnitude":
        (ours,) = (row for row in rows["ours"] if row["seed"] == seed)
        return {"stages": [row_of(learn_dense(options, data, weights_of(each)[1]), data) for each in ours["stages"]]}
    stages = []
    for model in learn_stages(options, data):
        stages.append(row_of(model, data))
        if options.structured:
            stages[-1]["speed"] = speed(dense_network(options.net), kv.compact(model), data["test"][0])
    return {"stages": stages}


def show(rows, options):
    """Print our results beside the published ones."""
    print(f"\n{'':<52}{'error %':>16}{'ratio':>16}{'with biases':>16}{'bytes':>10}{'gzipped':>10}  shapes")
    for name, each in rows.items():
        for stage, of_seeds in enumerate(zip(*(row.get("stages", [row]) for row in each)), start=1):
            label = name if name == "dense" else f"{name}, stage {stage}"
            ratio, with_biases = (common.spread(values) for values in zip(*map(ratios, of_seeds)))
            size = [np.mean([row[key] for row in of_seeds]) for key in ("bytes", "gzipped")]
            print(
                f"{label:<52}{common.spread([row['error'] for row in of_seeds]):>16}{ratio:>16}{with_biases:>16}"
                f"{size[0]:>10,.0f}{size[1]:>10,.0f}  {of_seeds[0]['shapes']}"
            )
            zeros = {
                layer: 100 * (1 - np.mean([row["layers"][layer][1] / row["layers"][layer][0] for row in of_seeds]))
                for layer in of_seeds[0]["layers"]
            }
            print("  zero: " + ", ".join(f"{layer} {share:.2f} %" for layer, share in zeros.items()))
            for batch in of_seeds[0].get("speed", {}):
                times = common.spread([row["speed"][batch]["times"] for row in of_seeds])
                print(f"  {batch} images per batch: {times} times as fast as the dense network")
    if options.images == "mnist":
        for name, (error, ratio) in PUBLISHED[options.net].items():
            print(f"{name:<52}{'-' if error is None else f'{error:.2f}':>16}{ratio:>16}")


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--net", choices=[*STAGES], default="300-100")
    parser.add_argument("--prior", choices=["ard", "log_uniform"], default="ard")
    parser.add_argument("--images", choices=["mnist", "fashion_mnist"], default="mnist")
    parser.add_argument("--structured", action="store_true", help="prune whole pixels and units")
    parser.add_argument("--validation", action="store_true", help="score on 10,000 of the training images")
    parser.add_argument("--epochs", type=int, help="epochs of every round, instead of the recipe's")
    options = parser.parse_args()
    if options.structured and options.prior != "ard":
        parser.error("--structured needs the ARD prior over groups. Use --prior ard.")
    if options.quick:
        options.seeds, options.epochs = 1, options.epochs or 2
    data = images.load(options.data, None if options.quick else options.images, options.validation)
    rows = {}
    learn_this = functools.partial(learn, data=data, options=options, rows=rows)
    networks = ("dense", "ours") if options.structured else ("dense", "ours", "magnitude")
    show(common.learn_rows(networks, options, learn_this, rows), options)


if __name__ == "__main__":
    main()
