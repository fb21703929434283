"""Memory does not grow with the number of calls of `fit` and `predict`."""

import pathlib

import keras
import numpy as np
import pytest

import keras_vdrop as kv

STATUS = pathlib.Path("/proc/self/statm")


def resident():
    """Return the resident memory of this process in MB."""
    return int(STATUS.read_text().split()[1]) * 4096 / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="reads /proc")
def test_memory_is_flat():
    model = keras.Sequential([keras.Input((5, 8)), kv.VariationalLSTM(16), kv.VariationalDense(4)])
    model.compile("adam", "mse")
    x, y = np.ones((16, 5, 8), "float32"), np.ones((16, 4), "float32")
    elbo, drawn = kv.ELBO(len(x), warmup_epochs=0, start_epoch=0), kv.MonteCarlo(model, 4)

    def work(times):
        for _ in range(times):
            model.fit(x, y, epochs=1, callbacks=[elbo], verbose=0)
            drawn.predict(x, verbose=0)

    work(20)
    before = resident()
    work(100)
    assert resident() - before < 30
