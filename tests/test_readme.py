"""What the README shows runs as it is written."""

import pathlib
import re

import keras
import numpy as np
import pytest

import keras_vdrop as kv

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture
def names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    model = keras.Sequential([keras.Input((28, 28, 1)), keras.layers.Flatten(), kv.VariationalDense(10)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    x, y = rng.normal(size=(64, 28, 28, 1)).astype("float32"), rng.integers(0, 10, 64)
    return {"x": x, "y": y, "model": model, "keras": keras, "kv": kv}


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_blocks_run(block, names):
    if ".export(" in block and keras.backend.backend() != "tensorflow":
        pytest.skip("Keras exports all of these formats from TensorFlow only.")
    exec(compile(block, str(README), "exec"), names)


def test_every_public_name_is_shown():
    text = README.read_text()
    missing = [name for name in kv.__all__ if not name.startswith("_") and name not in text]
    assert missing == []
