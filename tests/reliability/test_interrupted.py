"""A run that is killed and resumed ends as one that was never killed: weights, masks, noise, schedule, optimizer."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = """
import os, signal, sys
import keras, numpy as np
import keras_vdrop as kv

folder, way, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
x, y = rng.normal(size=(32, 4, 3)).astype("float32"), rng.normal(size=(32, 2)).astype("float32")


class Kill(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if self.epoch == kill_at and batch == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch


path = os.path.join(folder, "checkpoint.keras")
begin, callbacks = 0, [Kill(), kv.ELBO(len(x), warmup_epochs=3)]
if way == "checkpoint":
    callbacks.append(keras.callbacks.ModelCheckpoint(path))
elif way == "backup":
    callbacks.append(keras.callbacks.BackupAndRestore(os.path.join(folder, "backup")))
if os.path.exists(path):
    model = keras.saving.load_model(path)
    begin = int(model.optimizer.iterations) // 4
else:
    model = keras.Sequential(
        [
            keras.Input((4, 3)),
            kv.VariationalLSTM(3, recurrent_dropout=0.2),
            kv.MonteCarloDropout(0.2),
            kv.VariationalDense(2, kernel_prior=kv.priors.Normal(trainable=True)),
        ]
    )
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    kv.prune(model, -5.5)
model.fit(x, y, batch_size=8, epochs=4, initial_epoch=begin, shuffle=False, callbacks=callbacks, verbose=0)
variables = {variable.path: variable for variable in [*model.variables, *model.optimizer.variables]}
np.savez(os.path.join(folder, "end.npz"), **{str(i): np.asarray(v) for i, v in enumerate(variables.values())})
"""


def run(folder, way, kill_at=-1):
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), way, str(kill_at)])


def end(folder):
    with np.load(folder / "end.npz") as file:
        return [file[str(i)] for i in range(len(file.files))]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL") or os.name != "posix", reason="needs SIGKILL")
def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    ways = "backup", "checkpoint"
    whole = run(tmp_path / "whole", "none")
    killed = [run(tmp_path / way, way, kill_at=2) for way in ways]
    assert whole.wait() == 0
    assert [process.wait() for process in killed] == [-signal.SIGKILL] * len(ways)
    resumed = [run(tmp_path / way, way) for way in ways]
    assert [process.wait() for process in resumed] == [0] * len(ways)
    expected = end(tmp_path / "whole")
    for way in ways:
        found = end(tmp_path / way)
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            np.testing.assert_array_equal(one, other, err_msg=way)
