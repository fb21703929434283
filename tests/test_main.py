"""The command line, but for the demo."""

import gzip

import keras
import numpy as np
import pytest

import keras_vdrop as kv
from keras_vdrop.__main__ import main
from tests.cases import array, stock


@pytest.fixture
def saved(tmp_path):
    model = keras.Sequential([keras.Input((8,)), kv.VariationalDense(16, activation="relu"), kv.VariationalDense(3)])
    log_variance = np.full((8, 16), -40.0)
    log_variance[:, 5:] = 10.0
    model.layers[0].kernel.log_variance.assign(log_variance)
    model.save(tmp_path / "model.keras")
    return tmp_path / "model.keras"


def test_report(saved, capsys):
    assert not main(["report", str(saved)])
    assert "variational_dense " in capsys.readouterr().out
    main(["report", str(saved), "--threshold", "-50"])
    assert "infx" in capsys.readouterr().out


def test_compact(saved, tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(20, 8)).astype("float32")
    np.savez(tmp_path / "x.npz", x=x)
    small = tmp_path / "small.keras"
    assert not main(["compact", str(saved), "-o", str(small), "--data", str(tmp_path / "x.npz")])
    printed = capsys.readouterr().out
    for path in (saved, small):
        gzipped = len(gzip.compress(path.read_bytes(), mtime=0))
        assert f"{path}: {path.stat().st_size:,} bytes, {gzipped:,} gzipped\n" in printed
    small, model = keras.saving.load_model(small), keras.saving.load_model(saved)
    assert stock(small) and small.layers[0].units == 5
    kv.prune(model)
    np.testing.assert_allclose(array(small(x)), array(model(x)), atol=1e-5)


def test_nothing_is_written_over_unless_told(saved, tmp_path, capsys):
    taken = tmp_path / "taken.keras"
    taken.write_text("precious")
    with pytest.raises(SystemExit):
        main(["compact", str(saved), "-o", str(taken)])
    assert "is there already" in capsys.readouterr().err
    assert taken.read_text() == "precious"
    main(["compact", str(saved), "-o", str(taken), "--force"])
    assert keras.saving.load_model(taken).layers[0].units == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere.keras"], "nowhere.keras is not there"),
        (["compact", "{saved}", "-o", "small.h5"], "must end in .keras"),
        (["compact", "{saved}", "-o", "small.keras", "--data", "nowhere.npz"], "nowhere.npz is not there"),
        (["compact", "{saved}", "-o", "small.keras", "--data", "{saved}"], "must hold an array for each of 1 inputs"),
        (["compact", "{saved}", "-o", "small.keras", "--data", __file__], "is no .npz file"),
        (["compact", "{saved}", "-o", "nowhere/small.keras"], "The folder nowhere is not there"),
        (["report", "{saved}", "--threshold", "nan"], "must be a finite number"),
    ],
)
def test_bad_input(arguments, message, saved, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([argument.format(saved=saved) for argument in arguments])
    assert message in capsys.readouterr().err
