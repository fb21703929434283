"""Several devices, made of one processor, and several processes."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import keras
import pytest

BACKEND = keras.backend.backend()
of_jax = pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution is JAX's")
of_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute is TensorFlow's")
PAGE = pathlib.Path(__file__).parents[1] / "docs" / "guides" / "devices.md"

SCRIPT = """
import json, sys
import keras, numpy as np
import keras_vdrop as kv
from keras.distribution import DataParallel, DeviceMesh, LayoutMap, ModelParallel, list_devices

devices = list_devices("cpu")
assert len(devices) == 2


def layout_map(mesh, keys):
    layouts = LayoutMap(mesh)
    for key, axes in keys.items():
        layouts[key] = axes
    return layouts


def model_parallel(keys):
    mesh = DeviceMesh((1, 2), ["batch", "model"], devices)
    return ModelParallel(layout_map=layout_map(mesh, keys), batch_dim_name="batch")


def learned(distribution):
    keras.utils.clear_session()
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(32, 8, 6)).astype("float32")
    model = keras.Sequential(
        [
            keras.Input((8, 6)),
            kv.VariationalLSTM(4, kernel_prior="normal", return_sequences=True, name="lstm"),
            keras.layers.Flatten(),
            kv.VariationalDense(10, kernel_prior=kv.priors.Normal(trainable=True), bias_prior="normal", name="dense"),
            kv.VariationalDense(2, kernel_prior="ard", name="last"),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")
    losses = model.fit(x, np.ones((32, 2)), batch_size=16, epochs=2, callbacks=[kv.ELBO(32)], verbose=0).history["loss"]
    draws = kv.MonteCarlo(model, 4, output="samples", seed=1).predict(x, verbose=0)
    kv.prune(model, 0.0)
    split = sorted(
        v.path for v in [*model.variables, *model.optimizer.variables] if not v.value.sharding.is_fully_replicated
    )
    return {"losses": losses, "draws": draws.tolist(), "pruned": kv.sparsity(model).left, "split": split}


# The first one is also found in the paths of scalars that a prior learns.
keys = {".*dense/kernel.*": (None, "model"), ".*recurrent_kernel.*": (None, "model"), ".*dense/bias.*": ("model",)}
print(json.dumps({
    "one": learned(None),
    "data": learned(DataParallel(devices=devices)),
    "model": learned(model_parallel(keys)),
    "own": learned(model_parallel({".*dense/kernel_loc": (None, "model"), ".*dense/kernel": ("model", None)})),
}))
"""


@pytest.fixture(scope="module")
def learned():
    environment = {
        **os.environ,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2",
    }
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@of_jax
@pytest.mark.parametrize("how", ["data", "model", "own"])
def test_learns_draws_and_prunes_as_on_one_device(learned, how):
    one, other = learned["one"], learned[how]
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-4)
    assert keras.ops.convert_to_numpy(other["draws"]) == pytest.approx(
        keras.ops.convert_to_numpy(one["draws"]), rel=1e-3, abs=1e-4
    )
    assert one["pruned"] == other["pruned"]


@of_jax
def test_a_layout_map_made_for_keras_layers_splits_what_belongs_to_each_weight(learned):
    assert learned["one"]["split"] == learned["data"]["split"] == []
    split = learned["model"]["split"]
    for weight in ("dense/kernel", "dense/bias", "lstm/cell/recurrent_kernel"):
        for part in ("loc", "log_variance", "mask"):
            assert any(path.endswith(f"{weight}_{part}") for path in split), (weight, part, split)
    assert not any("last" in path or "cell/kernel" in path for path in split)


@of_jax
def test_a_key_of_the_variable_itself_goes_first(learned):
    assert any(path.endswith("dense/kernel_log_variance") for path in learned["own"]["split"])


def script(backend):
    """Return the page's script for several processes, with ports that are free."""
    pattern = rf"```python\n(# train.py, {backend}\n.*?)```"
    (found,) = re.findall(pattern, PAGE.read_text(), re.DOTALL)
    for port in ("29500", "29501"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            found = found.replace(port, str(free.getsockname()[1]))
    return found


def losses_of(script, numbers):
    """Run the script in one process for each number, at the same time, and return the losses that each prints."""
    command = [sys.executable, "-c", script]
    runs = [
        subprocess.Popen([*command, number], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number in numbers
    ]
    outputs = [run.communicate(timeout=300) for run in runs]
    assert not any(run.returncode for run in runs), outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@of_jax
@pytest.mark.slow
def test_two_processes_learn_as_one():
    two = script("JAX")
    # In one process: the whole data set, in batches of the same rows in the same order.
    one = re.sub("keras.distribution.initialize.*\n", "", two)
    one = re.sub("own = .*", "own = np.arange(32).reshape(2, 8, 2).swapaxes(1, 2).ravel()", one)
    (expected,) = losses_of(one.replace("batch_size=8", "batch_size=16"), "0")
    for losses in losses_of(two, "01"):
        assert losses == pytest.approx(expected, rel=1e-5)


@of_tensorflow
@pytest.mark.slow
def test_two_workers_learn_by_a_loop_of_ones_own():
    two = script("TensorFlow")
    one = two.replace(two[two.index("workers =") : two.index("task =")], "workers = ['127.0.0.1:0']\n")
    (expected,) = losses_of(one, "0")
    first, second = losses_of(two, "01")
    assert first == second
    assert first == pytest.approx(expected, rel=0.05)  # each worker has noise of its own
