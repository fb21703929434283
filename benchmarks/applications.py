"""Check that converting the networks of `keras.applications`, there and back and through a file, keeps their outputs.

    python benchmarks/applications.py --out benchmarks/results/applications.json

If KerasHub is installed (`pip install keras-hub`), two small backbones of it, BERT and a ResNet, are checked too.

Each network has random weights, biases and moments. Those of `keras.applications` take images of the smallest size that
they accept, and have no final activation. `to_variational` converts the network; the variational model is saved and
loaded; `to_deterministic` converts the loaded model back. The outputs of the converted, the loaded and the
reconverted model for two examples are compared with those of the original: the largest absolute difference, divided by
the largest absolute output.

The result holds for each network: these differences; how many of its weights have a posterior, and how many weights its
kernels and tables have in all; the seconds of building the network, of both conversions, of saving and of loading; and
the size of the file relative to that of the original network.

`--only NAME ...` checks only these networks; with `--resume`, the rows that `--out` already holds are kept. `--jobs`
distributes the networks over several processes.
"""

import importlib.util
import pathlib
import tempfile
import time
import types
import warnings

import common
import keras
import numpy as np

import keras_vdrop as kv
from keras_vdrop.conversion import finalize_normalizations
from keras_vdrop.posterior import posteriors

# Image sizes to try, in this order: some networks do not accept 32.
SIZES = (32, 64, 71, 75, 96, 128, 160, 224, 331)
CLASSES, ROWS = 10, 2
HUB = ("keras_hub.BertBackbone", "keras_hub.ResNetBackbone")
QUICK = ("MobileNetV2",)


def networks():
    """Return {name: function} of all networks, without aliases."""
    found = {}
    for name, function in sorted(vars(keras.applications).items()):
        if isinstance(function, types.FunctionType) and name[0].isupper() and function not in found.values():
            found[name] = function
    return found


def made(name):
    """Build the network and random inputs; for `keras.applications`, images of the smallest accepted size."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    if name in HUB:
        return _from_hub(name, rng)
    for size in SIZES:
        try:
            model = networks()[name](
                weights=None, input_shape=(size, size, 3), classes=CLASSES, classifier_activation=None
            )
        except ValueError as error:
            refused = error
        else:
            return model, rng.uniform(0.0, 255.0, (ROWS, size, size, 3)).astype("float32")
    raise refused


def _from_hub(name, rng):
    from keras_hub import models

    if name.endswith("BertBackbone"):
        model = models.BertBackbone(
            vocabulary_size=1_000,
            num_layers=4,
            num_heads=4,
            hidden_dim=128,
            intermediate_dim=512,
            max_sequence_length=16,
        )
        tokens = rng.integers(0, 1_000, (ROWS, 16))
        kept = np.arange(16) < np.array([[16], [9]])
        return model, {"token_ids": tokens, "segment_ids": tokens % 2, "padding_mask": kept.astype("int32")}
    model = models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 128, 256, 512],
        stackwise_num_blocks=[2, 2, 2, 2],
        stackwise_num_strides=[1, 2, 2, 2],
        block_type="basic_block",
        image_shape=(32, 32, 3),
    )
    return model, rng.normal(size=(ROWS, 32, 32, 3)).astype("float32")


def shake(model):
    """Change biases, scales and moments from 0 or 1, so that a copy which lost them gives other outputs."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if len(weight.shape) == 1:
            weight.assign(weight + rng.uniform(0.0, 0.1, weight.shape))
    finalize_normalizations(model)


def kernels(model):
    """Count the elements of all trainable weights with two axes or more."""
    return sum(int(np.prod(each.shape)) for each in model.trainable_weights if len(each.shape) > 1)


def timed(function, *arguments):
    """Return the result of the function, and the seconds that it took."""
    begin = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - begin


def convert(name):
    """Convert one network there and back, and return its row of results."""
    (model, x), seconds = timed(made, name)
    shake(model)

    def outputs(model):
        return [keras.ops.convert_to_numpy(each) for each in keras.tree.flatten(model(x, training=False))]

    expected = outputs(model)
    largest = float(max(np.abs(each).max() for each in expected))

    def difference(other):
        return float(max(np.abs(one - each).max() for one, each in zip(expected, outputs(other)))) / largest

    lines = []
    bayesian, there = timed(lambda: kv.to_variational(model, print_fn=lines.append))
    sizes = [each.shape[1:] for each in keras.tree.flatten(x)]
    row = {"inputs": sizes, "parameters": model.count_params(), "kernels": kernels(model), "largest_output": largest}
    row["distributions"] = sum(posterior.size for posterior in posteriors(bayesian))
    row["converted"] = difference(bayesian)
    with tempfile.TemporaryDirectory() as folder:
        path, plain = (pathlib.Path(folder, f"{name}.keras") for name in ("ours", "plain"))
        _, saved = timed(bayesian.save, path)
        del bayesian
        loaded, load = timed(keras.saving.load_model, path)
        model.save(plain)
        row["file"] = path.stat().st_size / plain.stat().st_size
    row["loaded"] = difference(loaded)
    back, again = timed(kv.to_deterministic, loaded)
    row["back"] = difference(back)
    row["seconds"] = {"made": seconds, "converted": there, "saved": saved, "loaded": load, "back": again}
    row["stay"] = [line for line in lines if " stays" in line or "Variational(" in line]
    return row


def main():
    parser = common.parser(__doc__, seeds=None)
    names = [*networks(), *(HUB if importlib.util.find_spec("keras_hub") else ())]
    parser.add_argument("--only", nargs="+", choices=names, help="run only these networks")
    options = parser.parse_args()
    options.seeds = 1  # rounding differences do not depend on the seed
    warnings.simplefilter("ignore")
    names = options.only or (QUICK if options.quick else names)
    del options.only  # it does not affect a row, so `--resume` may use another one
    rows = common.learn_rows(names, options, lambda name, seed: convert(name))
    print(f"\n{'':<20}{'parameters':>13}{'drawn':>8}{'converted':>11}{'loaded':>9}{'back':>9}  seconds")
    for name, (row,) in sorted(rows.items()):
        drawn = row["distributions"] / row["kernels"]
        differences = f"{row['converted']:>11.1e}{row['loaded']:>9.1e}{row['back']:>9.1e}"
        seconds = ", ".join(f"{each} {value:.1f}" for each, value in row["seconds"].items())
        print(f"{name:<20}{row['parameters']:>13,}{drawn:>8.1%}{differences}  {seconds}")


if __name__ == "__main__":
    main()
