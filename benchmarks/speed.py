"""Measure the time and memory of training and prediction, compared with Keras's layers and other packages.

    python benchmarks/speed.py --out benchmarks/results/speed.json

Times are medians of repeats after compilation; ratios are taken within one run. The compared functions run in turn, so
that other load on the machine affects all of them alike. Each topic is measured with and without XLA:

- training: the time of a step of two networks of dense layers, of LeNet-5 and of an LSTM, with Keras's layers, ours,
  and those of TensorFlow Probability and of packages for PyTorch, if they are installed (peers.py says how).
- prediction: the time to get the mean probability of 100 draws for 1,000 examples. `MonteCarlo` with per-example draws
  and with consistent ones is compared with its alternatives: a Python loop over `model(x, training=True)`, the same
  loop over a compiled function, and one call of that function on every example repeated 100 times. The topic also
  measures, in a separate process, how far memory rises above that of the process with the built model.
- growth: the time of a training step against the width, depth and batch size, and that of `MonteCarlo` and the compiled
  loop against the number of draws, with the exponent of the growth between the last two sizes; `--plot FILE.png` plots
  it.
- replicas: the time of a training step on 1, 2 and 4 replicas with 128 examples each: `MirroredStrategy` on TensorFlow,
  `DataParallel` on JAX. Without GPUs, the replicas share the cores of the CPU.
- memory: growth and peak of the memory of a process that trains the network 1024-1024-1024-10.
- large: the time of a training step of four networks that fill a GPU, and of the mean of 100 draws for 10,000
  examples, with XLA, in float32 (TF32 on GPUs that have it) and in mixed_bfloat16. This topic runs only if it is named:
  on a CPU its steps take seconds to minutes.
- compilation: the seconds of the first training step of a new model, and of the first `predict` of `MonteCarlo` and of
  the model that it wraps. Medians of three models each, after one that is not counted.

`--backend` and `--device` select the backend and the device; the defaults are KERAS_BACKEND and the device that the
backend chooses.
"""

import concurrent.futures
import contextlib
import functools
import math
import multiprocessing
import os
import pathlib
import threading
import time

import common
import keras
import large
import numpy as np
import peers

import keras_vdrop as kv
from keras_vdrop.functional import estimators

# Training

# {title: (batch size, shape of an example, layers in the format of peers.py)}
NETWORKS = {
    "784-300-100-10, batch 128": (128, (784,), [("dense", 300), ("dense", 100), ("dense", 10)]),
    "1024-1024-1024-10, batch 512": (512, (1024,), [("dense", 1024), ("dense", 1024), ("dense", 10)]),
    "LeNet-5, batch 100": (
        100,
        (28, 28, 1),
        [
            ("convolution", 20, 5),
            ("pool",),
            ("convolution", 50, 5),
            ("pool",),
            ("flatten",),
            ("dense", 500),
            ("dense", 10),
        ],
    ),
}
LSTM = "LSTM, batch 32 of 64 steps of 128, 256 units"
BATCH, STEPS, INPUTS, UNITS = 32, 64, 128, 256
MASKS = {"dropout": 0.25, "recurrent_dropout": 0.25}
KL = {"kl_weight": peers.KL_WEIGHT}

# The (dense, convolution) classes of each variant. The first variant is the baseline of the ratios.
WEIGHTS = {
    "keras.layers": (keras.layers.Dense, keras.layers.Conv2D),
    **{
        estimator: tuple(
            functools.partial(cls, estimator=estimator, **KL) for cls in (kv.VariationalDense, kv.VariationalConv2D)
        )
        for estimator in estimators.ESTIMATORS
    },
}
# Noise layers, placed after every hidden `keras.layers.Dense`.
NOISES = {
    "keras.layers.Dropout": lambda: keras.layers.Dropout(0.5),
    "keras.layers.GaussianDropout": lambda: keras.layers.GaussianDropout(0.5),
    "MonteCarloDropout": lambda: kv.MonteCarloDropout(0.5),
    "VariationalGaussianDropout": lambda: kv.VariationalGaussianDropout(0.5, **KL),
}
LSTMS = {
    "keras.layers.LSTM": lambda units: keras.layers.LSTM(units),
    "keras.layers.LSTM, two dropout rates": lambda units: keras.layers.LSTM(units, **MASKS),
    "classic: masks only": lambda units: kv.VariationalLSTM(units, kernel_prior=None, **MASKS),
    "reparameterization": lambda units: kv.VariationalLSTM(units, **KL),
    "Variational(keras.layers.LSTM)": lambda units: kv.Variational(keras.layers.LSTM(units), **KL),
    "flipout": lambda units: kv.VariationalLSTM(units, estimator="flipout", **KL),
}


def keras_step(model, optimizer, loss, x, y, jit):
    """Compile the model and return one training step as a function without arguments."""
    model.compile(optimizer, loss, jit_compile=jit)
    x, y = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)
    return lambda: model.train_on_batch(x, y)


def training_data(batch, shape):
    rng = np.random.default_rng(0)
    return rng.normal(size=(batch, *shape)).astype("float32"), rng.integers(0, 10, batch)


def training_steps(names, batch, shape, network, jit):
    """Return {name: step} for names of `WEIGHTS` and `NOISES`: Keras's layers and ours."""
    steps = {}
    for name in names:
        layers = WEIGHTS.get(name, WEIGHTS["keras.layers"])
        model = peers.keras_network(keras, network, shape, *layers, NOISES.get(name))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        steps[name] = keras_step(model, keras.optimizers.Adam(1e-3), loss, *training_data(batch, shape), jit)
    return steps


def network_steps(title, jit):
    """Return {name: step} of one network with Keras's layers, ours and those of other packages."""
    batch, shape, network = NETWORKS[title]
    steps = training_steps([*WEIGHTS, *(NOISES if len(shape) == 1 else ())], batch, shape, network, jit)
    x, y = training_data(batch, shape)
    if keras.backend.backend() == "tensorflow":
        steps.update(peers.tfp_steps(network, x, y, jit))
    return steps if jit else {**steps, **peers.torch_steps(network, x, y)}


def lstm_steps(units, x, y, jit):
    steps = {}
    for name, make in LSTMS.items():
        model = keras.Sequential([keras.Input(x.shape[1:]), make(units), keras.layers.Dense(1)])
        steps[name] = keras_step(model, keras.optimizers.SGD(1e-3), "mse", x, y, jit)
    return steps if jit else {**steps, **peers.torch_lstm_steps(units, x, y)}


# Prediction

ROWS, SAMPLES = 1_000, 100


def _mlp():
    return [(784,), *(kv.VariationalDense(width, activation="relu", **KL) for width in (300, 100))]


def _cnn():
    convolution = functools.partial(kv.VariationalConv2D, strides=2, padding="same", activation="relu", **KL)
    dense = kv.VariationalDense(128, activation="relu", **KL)
    return [(28, 28, 1), convolution(16, 5), convolution(32, 3), keras.layers.Flatten(), dense]


def _lstm():
    return [(32, 32), kv.VariationalLSTM(64, **KL)]


PREDICTED = {"784-300-100-10": _mlp, "CNN": _cnn, "LSTM": _lstm}
WAYS = ("MonteCarlo", "MonteCarlo, consistent", "loop", "compiled loop", "rows repeated")


def predicted_model(name):
    shape, *hidden = PREDICTED[name]()
    return keras.Sequential([keras.Input(shape), *hidden, kv.VariationalDense(10, **KL)])


def prediction_step(way, model, x, samples, jit):
    """Return a function without arguments that computes the mean probability of `samples` draws."""
    if way.startswith("MonteCarlo"):
        consistent = way.endswith("consistent")
        sampler = kv.MonteCarlo(model, samples, likelihood="categorical", consistent=consistent)
        sampler.compile(jit_compile=jit)
        return lambda: sampler.predict_on_batch(x)
    draw = functools.partial(model, training=True) if way == "loop" else compiled(model, jit)
    if way == "rows repeated":

        def run():
            logits = draw(keras.ops.tile(x, (samples, *[1] * (len(x.shape) - 1))))
            return _probability(keras.ops.reshape(logits, (samples, x.shape[0], -1)))
    else:

        def run():
            return _probability(keras.ops.stack([draw(x) for _ in range(samples)]))

    return run


def _probability(logits):
    return keras.ops.convert_to_numpy(keras.ops.mean(keras.ops.softmax(logits), axis=0))


def compiled(model, jit):
    """Return `model(x, training=True)` as a compiled function with new noise at each call."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(functools.partial(model, training=True), jit_compile=jit)
    import jax

    @jax.jit
    def call(trainable, others, x):
        return model.stateless_call(trainable, others, x, training=True)

    def draw(x):
        variables = model.non_trainable_variables
        outputs, others = call([v.value for v in model.trainable_variables], [v.value for v in variables], x)
        for variable, value in zip(variables, others):
            variable.assign(value)
        return outputs

    return draw


def predicted_rows(model, rows):
    x = np.random.default_rng(0).normal(size=(rows, *model.input_shape[1:])).astype("float32")
    return keras.ops.convert_to_tensor(x)


def _time_predictions(name, rows, samples, jit, repeats):
    model = predicted_model(name)
    x = predicted_rows(model, rows)
    return summary(common.measure({way: prediction_step(way, model, x, samples, jit) for way in WAYS}, repeats))


def _predict(name, way, rows, samples, jit):
    model = predicted_model(name)
    x = predicted_rows(model, rows)
    model(x[:10])
    return grown(prediction_step(way, model, x, samples, jit))


# Growth

GROWTH = {
    "width": (64, 128, 256, 512, 1024, 2048),
    "depth": (1, 2, 4, 8, 16),
    "batch": (32, 64, 128, 256, 512, 1024),
    "draws": (1, 4, 16, 64, 256),
}
GROWING = ("keras.layers", "local_reparameterization")


def grown_steps(axis, size, jit):
    """Return {name: step} with `size` on the given axis; by default width 256, depth 2 and batches of 128."""
    sizes = {"width": 256, "depth": 2, "batch": 128, axis: size}
    network = [("dense", sizes["width"])] * sizes["depth"] + [("dense", 10)]
    if axis == "draws":
        model = peers.keras_network(keras, network, (256,), *WEIGHTS["local_reparameterization"])
        x = predicted_rows(model, 128)
        return {way: prediction_step(way, model, x, size, jit) for way in ("compiled loop", "MonteCarlo")}
    return training_steps(GROWING, sizes["batch"], (sizes["width"],), network, jit)


REPLICAS = (1, 2, 4)


def _time_replicas(count, repeats):
    # `train_on_batch` gives each replica of TensorFlow the whole batch, and each of JAX its share.
    batch = 128 if keras.backend.backend() == "tensorflow" else 128 * count
    network = [("dense", 256), ("dense", 256), ("dense", 10)]
    with replicated(count):
        return common.measure(training_steps(GROWING, batch, (256,), network, "auto"), repeats)


def replicated(count):
    """Return the scope in which a model is trained on the first `count` devices of a new process."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
        if kind == "CPU":
            (cpu,) = tf.config.list_physical_devices("CPU")
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
        return tf.distribute.MirroredStrategy([f"{kind}:{index}" for index in range(count)]).scope()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return keras.distribution.DataParallel(devices=keras.distribution.list_devices()[:count]).scope()


def exponents(sizes, rows):
    """Return {name: d log ms / d log size between the last two sizes}."""
    span = math.log(sizes[-1] / sizes[-2])
    return {name: math.log(values[-1] / values[-2]) / span for name, values in rows.items()}


def plot_growth(result, path):
    """Plot ms against size on logarithmic axes, one plot for each growing size, with and without XLA."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(GROWTH), figsize=(4.5 * len(GROWTH), 7), squeeze=False, layout="constrained")
    for ax, (title, each) in zip(axes.T.flatten(), result.items()):
        for marker, (name, values) in zip("os", each["ms"].items()):
            ax.loglog(each["sizes"], values, marker=marker, label=f"{name}: slope {each['exponents'][name]:.2f}")
        highest = max(value for values in each["ms"].values() for value in values)
        ax.set(title=title, xlabel=each["axis"], ylabel="ms a step", ylim=(None, 4 * highest))
        ax.legend(loc="upper left", fontsize="small")
    figure.savefig(path, dpi=100)


# Memory


def apart(function, *arguments):
    """Run `function` in a new process, whose memory is free afterwards, and return its result."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def _train(name, title, jit):
    batch, shape, network = NETWORKS[title]
    (step,) = training_steps([name], batch, shape, network, jit).values()
    return grown(lambda: [step() for _ in range(5)])


def grown(function):
    """Run `function`; return the peak memory of the process and how far it exceeds the memory before, in MB."""
    before = _resident("VmRSS")
    _forget_peak()
    function()
    peak = _resident("VmHWM")
    return {"MB": peak - before, "peak MB": peak}


def _forget_peak():
    """Reset Linux's record of the peak memory of this process."""
    if (path := pathlib.Path("/proc/self/clear_refs")).is_file():
        path.write_text("5")


def _resident(kind):
    """Return the memory of this process in MB, current ("VmRSS") or peak ("VmHWM"); NaN without Linux's /proc."""
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(kind)), math.nan)


# Tables and command line


def summary(seconds):
    """Return for every step the median of its ms, and of its ratio to the first step in the same repeat."""
    base = next(iter(seconds.values()))
    return {
        name: {"ms": 1e3 * float(np.median(values)), "ratio": float(np.median(values / base))}
        for name, values in seconds.items()
    }


def show(title, rows):
    print(f"\n{title:<60}{'ms a step':>10}{'ratio':>8}" + ("      MB" if "MB" in next(iter(rows.values())) else ""))
    for name, row in rows.items():
        memory = f"{row['MB']:>8.0f}" if "MB" in row else ""
        print(f"{name:<60}{row['ms']:>10.1f}{row['ratio']:>8.2f}{memory}", flush=True)


def modes(options):
    """Return the values of `jit_compile` to measure."""
    return (True,) if options.quick else (False, True)


def training(options):
    """Measure the topic "training" and return {title: rows}."""
    batch, steps, inputs, units = (4, 5, 6, 8) if options.quick else (BATCH, STEPS, INPUTS, UNITS)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(batch, steps, inputs)).astype("float32"), rng.normal(size=(batch, 1)).astype("float32")
    makers = {title: functools.partial(network_steps, title) for title in NETWORKS}
    makers[LSTM] = functools.partial(lstm_steps, units, x, y)
    result = {}
    for name in [*makers][:: 3 if options.quick else 1]:
        for jit in modes(options):
            title = f"{name}, {keras.backend.backend()}, jit_compile={jit}"
            result[title] = summary(common.measure(makers[name](jit), options.repeats, warm=True))
            show(title, result[title])
    return result


def prediction(options):
    """Measure the topic "prediction" and return {title: rows}."""
    rows, samples = (5, 3) if options.quick else (ROWS, SAMPLES)
    result = {}
    for name in list(PREDICTED)[: 1 if options.quick else None]:
        for jit in modes(options):
            each = apart(_time_predictions, name, rows, samples, jit, max(3, options.repeats // 5))
            for way in WAYS[: 1 if options.quick else None]:
                each[way].update(apart(_predict, name, way, rows, samples, jit))
            title = f"{samples} draws, {rows} rows: {name}, {keras.backend.backend()}, jit_compile={jit}"
            result[title] = each
            show(title, each)
    return result


def growth(options):
    """Measure the topic "growth" and return {title: axis, sizes, ms and exponents}."""
    result = {}
    for axis, sizes in GROWTH.items():
        sizes = sizes[: 2 if options.quick else None]
        for jit in modes(options):
            seconds = [common.measure(grown_steps(axis, size, jit), options.repeats, warm=True) for size in sizes]
            ms = {name: [1e3 * float(np.median(each[name])) for each in seconds] for name in seconds[0]}
            title = f"{axis}, {keras.backend.backend()}, jit_compile={jit}"
            result[title] = {"axis": axis, "sizes": sizes, "ms": ms, "exponents": exponents(sizes, ms)}
            show_growth(title, result[title])
    if options.plot is not None:
        plot_growth(result, options.plot)
    return result


def show_growth(title, found):
    print(f"\n{title:<60}" + "".join(f"{size:>8}" for size in found["sizes"]) + "   slope")
    for name, values in found["ms"].items():
        print(f"{name:<60}" + "".join(f"{v:>8.1f}" for v in values) + f"{found['exponents'][name]:>8.2f}", flush=True)


def growth_with_replicas(options):
    """Measure the topic "replicas" and return {title: axis, sizes, ms and exponents}."""
    if keras.backend.backend() == "torch":
        print("no replicas: Keras does not distribute PyTorch models")
        return {}
    counts = REPLICAS[: 2 if options.quick else None]
    found = [apart(_time_replicas, count, options.repeats) for count in counts]
    ms = {name: [1e3 * float(np.median(each[name])) for each in found] for name in found[0]}
    title = f"replicas, {keras.backend.backend()}"
    result = {"axis": "replicas", "sizes": counts, "ms": ms, "exponents": exponents(counts, ms)}
    show_growth(title, result)
    return {title: result}


def memory_of_training(options):
    """Measure the topic "memory" and return {title: rows}."""
    title = [*NETWORKS][0 if options.quick else 1]
    result = {}
    for jit in modes(options):
        rows = {name: apart(_train, name, title, jit) for name in list(WEIGHTS)[: 1 if options.quick else None]}
        base = next(iter(rows.values()))
        mode = f"{title}, {keras.backend.backend()}, jit_compile={jit}"
        result[mode] = {
            name: {**row, **{f"{key}, ratio": row[key] / base[key] for key in base}} for name, row in rows.items()
        }
        print(f"\n{'memory of training ' + mode:<84}{'MB':>8}{'ratio':>8}{'peak MB':>10}{'ratio':>8}")
        for name, row in result[mode].items():
            memory, peak = (f"{row[f'{key}, ratio']:>8.2f}" for key in ("MB", "peak MB"))
            print(f"{name:<84}{row['MB']:>8.0f}{memory}{row['peak MB']:>10.0f}{peak}", flush=True)
    return result


SMALLER = 64  # divisor of all sizes of "large" with --quick


def large_makers(scale):
    """Return {title: function to {name: training step}} of the networks of large.py, in the present policy."""
    makers = {}
    for title, (batch, shape, network) in large.feedforward(scale).items():
        makers[title] = functools.partial(large_feedforward_steps, batch, shape, network)
    for title, (batch, make) in large.models(scale).items():
        makers[title] = functools.partial(large_model_steps, batch, make)
    rows = 10_000 // scale
    makers[f"{SAMPLES} draws, {rows} rows: {next(iter(PREDICTED))}"] = functools.partial(large_prediction_steps, rows)
    return makers


def large_feedforward_steps(batch, shape, network):
    def make(kind):
        return peers.keras_network(keras, network, shape, kind.dense, kind.convolution)

    steps = large_model_steps(batch, make)
    # TensorFlow and PyTorch may need different versions of CUDA, and then do not run in one process.
    if keras.backend.backend() == "tensorflow" or keras.mixed_precision.dtype_policy().name != "float32":
        return steps
    return {**steps, **peers.torch_steps(network, *training_data(batch, shape), tf32=True)}


def large_model_steps(batch, make):
    steps = {}
    for name, kind in large.kinds(peers.KL_WEIGHT).items():
        if (model := make(kind)) is None:
            continue
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        data = training_data(batch, model.input_shape[1:])
        steps[name] = keras_step(model, keras.optimizers.Adam(1e-4), loss, *data, True)
    return steps


def large_prediction_steps(rows):
    model = predicted_model(next(iter(PREDICTED)))
    x = predicted_rows(model, rows)
    ways = ("compiled loop", "MonteCarlo", "MonteCarlo, consistent")
    return {way: prediction_step(way, model, x, SAMPLES, True) for way in ways}


def measured_in_turn(name, policy, options, all_compiled, turn):
    """Measure one large network, after all processes have compiled theirs and while no other process measures."""
    keras.mixed_precision.set_dtype_policy(policy)
    steps = large_makers(SMALLER if options.quick else 1)[name]()
    try:
        for step in steps.values():
            step()
    except BaseException:
        all_compiled.abort()
        raise
    with contextlib.suppress(threading.BrokenBarrierError):
        all_compiled.wait()
    with turn:
        return summary(common.measure(steps, options.repeats))


def of_large(options):
    """Measure the topic "large" and return {title: rows}."""
    names = [
        name for name in large_makers(SMALLER if options.quick else 1) if any(each in name for each in options.only)
    ]
    tasks = [(name, policy) for policy in options.policies for name in names][: 1 if options.quick else None]
    result = {}
    for start in range(0, len(tasks), options.jobs):
        for (name, policy), rows in _side_by_side(tasks[start : start + options.jobs], options):
            title = f"{name}, {policy}, {keras.backend.backend()}"
            result[title] = rows
            show(title, rows)
            common.keep(options.out, {"repeats": options.repeats, "steps": {"large": result}})
    return result


def _side_by_side(tasks, options):
    """Yield each task and its rows. Tasks compile in parallel, each in a process, and are timed one after another."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, concurrent.futures.ProcessPoolExecutor(len(tasks), context) as pool:
        shared = manager.Barrier(len(tasks)), manager.Lock()
        futures = [(task, pool.submit(measured_in_turn, *task, options, *shared)) for task in tasks]
        for task, future in futures:
            if (error := future.exception()) is None:
                yield task, future.result()
            else:
                print(f"{', '.join(task)} failed: {error}", flush=True)


def first_step(name, title, jit):
    """Return the seconds of the first training step of a new model."""
    batch, shape, network = NETWORKS[title]
    step = training_steps([name], batch, shape, network, jit)[name]
    return seconds_of(step)


def first_prediction(way, name, rows, samples, jit):
    """Return the seconds of the first `predict` of a new model, or of a `MonteCarlo` of it."""
    model = predicted_model(name)
    predictor = kv.MonteCarlo(model, samples, likelihood="categorical") if way == "MonteCarlo" else model
    predictor.compile(jit_compile=jit)
    x = np.random.default_rng(0).normal(size=(rows, *model.input_shape[1:])).astype("float32")
    return seconds_of(functools.partial(predictor.predict, x, batch_size=rows, verbose=0))


def seconds_of(step):
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def compilation(options):
    """Measure the topic "compilation" and return {title: {name: {"seconds": ..., "ratio": ...}}}."""
    repeats = 1 if options.quick else 3
    rows, samples = (5, 3) if options.quick else (ROWS, SAMPLES)
    kinds = {
        f"first step: {title}": {name: functools.partial(first_step, name, title) for name in WEIGHTS}
        for title in NETWORKS
    }
    for name in PREDICTED:
        kinds[f"first predict: {name}"] = {
            way: functools.partial(first_prediction, way, name, rows, samples) for way in ("the model", "MonteCarlo")
        }
    result = {}
    for kind, firsts in list(kinds.items())[:: 3 if options.quick else 1]:
        for jit in modes(options):
            rounds = [[first(jit) for first in firsts.values()] for _ in range(1 + repeats)][1:]
            seconds = dict(zip(firsts, np.array(rounds).T))
            title = f"{kind}, {keras.backend.backend()}, jit_compile={jit}"
            result[title] = {
                name: {"seconds": each["ms"] / 1e3, "ratio": each["ratio"]} for name, each in summary(seconds).items()
            }
            print(f"\n{title:<60}{'seconds':>10}{'ratio':>8}")
            for name, row in result[title].items():
                print(f"{name:<60}{row['seconds']:>10.2f}{row['ratio']:>8.2f}", flush=True)
    return result


TOPICS = {
    "training": training,
    "prediction": prediction,
    "growth": growth,
    "replicas": growth_with_replicas,
    "memory": memory_of_training,
    "compilation": compilation,
    "large": of_large,
}


def main():
    parser = common.parser(__doc__, learns=False)
    common.add_places(parser)
    parser.add_argument("--topics", nargs="+", choices=list(TOPICS))
    parser.add_argument("--only", nargs="+", default=[""], help='"large" measures titles that contain one of these')
    parser.add_argument(
        "--jobs", type=int, default=1, help='number of processes in which "large" compiles; each is timed alone'
    )
    policies = ["float32", "mixed_bfloat16"]
    parser.add_argument("--policies", nargs="+", choices=policies, default=policies, help='precision of "large"')
    parser.add_argument(
        "--repeats", type=int, default=30, help="timed steps of each network; a fifth of them for long steps"
    )
    parser.add_argument("--plot", type=pathlib.Path, help="file for a plot of the growth")
    options = parser.parse_args()
    common.start_anew(options.backend, options.device)
    # Several processes share the memory of a GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    if options.topics is None:
        options.topics = [name for name in TOPICS if name != "large" or options.quick]
    if options.quick:
        options.repeats = 3
    print(*(f"{key}: {value}" for key, value in common.about().items()), sep="\n")
    result = {}
    for topic in options.topics:
        result[topic] = TOPICS[topic](options)
        common.keep(options.out, {"repeats": options.repeats, "steps": result})


if __name__ == "__main__":
    main()
