"""Compare the file sizes of a network in Keras's export formats, before and after `prune` and `compact`.

The benchmark trains the demo's convolutional network on scikit-learn's 8×8 digits twice: "weights" prunes single
weights, "groups" prunes whole filters and units. "before" is the network "weights", not pruned, converted to Keras
layers. A size is that of the file, or of all files of the folder, in bytes and after gzip. "deviation" is the largest
difference between the logits of the exported and of the variational model, over the test digits and all three networks.
Multiply-adds count only kept weights.

    pip install -e ".[demo,export]"
    python benchmarks/export.py --out benchmarks/results/export.json
"""

import contextlib
import functools
import pathlib
import sys
import tempfile
import warnings

import common
import keras
import numpy as np

import keras_vdrop as kv
from keras_vdrop.cli import demo
from keras_vdrop.costs import file_sizes


def save_keras(model, folder, x, quantized=False):
    """Save in Keras's format; `quantized` uses int8 where Keras supports it: Dense and Embedding, not convolutions."""
    path = folder / "model.keras"
    model.save(path)
    if quantized:
        model = keras.saving.load_model(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns of layers without int8 support
            model.quantize("int8")
        model.save(path)
    return path, keras.saving.load_model(path).predict(x, verbose=0)


def save_tensorflow(model, folder, x):
    import tensorflow as tf

    model.export(folder / "saved", verbose=False)
    loaded = tf.saved_model.load(folder / "saved")
    return folder / "saved", np.asarray(loaded.serve(x))


def save_onnx(model, folder, x):
    import onnxruntime

    path = folder / "model.onnx"
    model.export(path, format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(path)
    return path, session.run(None, {session.get_inputs()[0].name: x})[0]


def save_litert(model, folder, x, quantized=False):
    import tensorflow as tf
    from ai_edge_litert.interpreter import Interpreter

    path = folder / "model.tflite"
    one = [keras.InputSpec(shape=(1, *x.shape[1:]), dtype=x.dtype.name)]
    options = {"optimizations": [tf.lite.Optimize.DEFAULT]} if quantized else {}
    model.export(path, format="litert", input_signature=one, verbose=False, **options)
    runner = Interpreter(str(path)).get_signature_runner()
    (name,) = runner.get_input_details()
    return path, np.concatenate([next(iter(runner(**{name: each[None]}).values())) for each in x])


FORMATS = {
    "Keras": save_keras,
    "Keras, int8": functools.partial(save_keras, quantized=True),
    "SavedModel": save_tensorflow,
    "ONNX": save_onnx,
    "LiteRT": save_litert,
    "LiteRT, int8": functools.partial(save_litert, quantized=True),
}


# Settings of the networks in the result table.
SLOW = {"initial_log_variance": -10.0, "log_variance_rate": 1.0, "estimator": "local_reparameterization"}
PRIORS = {"weights": "log_uniform", "groups": kv.priors.ARD(group_axis=-1)}


def learn(prior, data, options):
    """Train the demo network with the given prior, and return it."""
    keras.utils.set_random_seed(options.seed)
    x, y = data
    elbo = kv.ELBO(len(x), schedule=lambda epoch: options.temperature * min(1.0, 2 * epoch / options.epochs))
    of = [functools.partial(cls, kernel_prior=prior, **SLOW) for cls in (kv.VariationalDense, kv.VariationalConv2D)]
    return demo.train(demo.network(*of), x, y, options.epochs, [elbo], rate=6e-3, verbose=0)


def measure(model, expected, x, save):
    """Return the sizes of one format, and the largest difference of its predictions from `expected`."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        path, found = save(model, pathlib.Path(folder), x)
        plain, gzipped = file_sizes(path)
    return {"bytes": plain, "gzipped": gzipped, "deviation": float(np.abs(found - expected).max())}


def show(networks, formats):
    """Print the tables of the networks and of the formats."""
    print(f"\n{'':<14}{'weights':>10}{'parameters':>12}{'multiply-adds':>15}{'accuracy %':>12}{'largest logit':>15}")
    for name, row in networks.items():
        sizes = f"{row['weights']:>10,}{row['parameters']:>12,}{row['multiply_adds']:>15,}"
        print(f"{name:<14}{sizes}{100 * row['accuracy']:>12.1f}{row['largest_logit']:>15.1f}")
    print(f"\n{'':<14}" + "".join(f"{name:>10}{'gzipped':>10}" for name in networks) + f"{'deviation':>12}")
    for name, row in formats.items():
        sizes = "".join(f"{each['bytes']:>10,}{each['gzipped']:>10,}" for each in row.values())
        print(f"{name:<14}{sizes}{max(each['deviation'] for each in row.values()):>12.1e}")


def main():
    parser = common.parser(__doc__, learns=False)
    parser.add_argument("--seed", type=int, default=0, help="seed of the split, the weights and the noise")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--temperature", type=float, default=0.3, help="temperature of the KL; 1 is the ELBO")
    options = parser.parse_args()
    if keras.backend.backend() != "tensorflow":
        sys.exit("Keras exports all of these formats only with the TensorFlow backend.")
    if options.quick:
        options.epochs = 2
    data, (x, y) = demo.load_digits(options.seed)

    networks, small, expected = {}, {}, {}

    def add(name, network, logits, left, multiply_adds):
        small[name], expected[name] = network, logits
        networks[name] = {
            "weights": left,
            "parameters": network.count_params(),
            "multiply_adds": multiply_adds,
            "accuracy": float((logits.argmax(-1) == y).mean()),
            "largest_logit": float(np.abs(logits).max()),
        }

    for name, prior in PRIORS.items():
        model = learn(prior, data, options)
        if not networks:
            report = kv.sparsity(model)
            dense, logits = kv.to_deterministic(model), model.predict(x, verbose=0)
            add("before", dense, logits, report.weights, report.multiply_adds)
        report = kv.prune(model)
        print(f"{report}\n", flush=True)
        add(name, kv.compact(model), model.predict(x, verbose=0), report.left, report.multiply_adds_left)

    formats = {
        each: {name: measure(small[name], expected[name], x, save) for name in networks}
        for each, save in FORMATS.items()
    }
    show(networks, formats)
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "quick")}
    common.keep(options.out, {"options": settings, "networks": networks, "formats": formats})


if __name__ == "__main__":
    main()
