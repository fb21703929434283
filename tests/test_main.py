"""The command line, without the demo's training."""

import errno
import gzip
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_vdrop as kv
import keras_vdrop_cli
from keras_vdrop_cli import main
from tests.cases import array, stock

pytestmark = pytest.mark.any_backend


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
    main(["report", str(saved), "--threshold", "-50"])  # at which nothing is kept
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("variational_dense", "total"))]
    assert len(rows) == 3 and all(row.split()[2:5] == ["0", "0.00", "-"] for row in rows)


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
    assert "already exists" in capsys.readouterr().err
    assert taken.read_text() == "precious"
    main(["compact", str(saved), "-o", str(taken), "--force"])
    assert keras.saving.load_model(taken).layers[0].units == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere.keras"], "There is no file nowhere.keras"),
        (["compact", "{saved}", "-o", "small.h5"], "must end in .keras"),
        (["compact", "{saved}", "-o", "small.keras", "--data", "nowhere.npz"], "There is no file nowhere.npz"),
        (["compact", "{saved}", "-o", "small.keras", "--data", __file__], "is not an .npz file"),
        (["compact", "{saved}", "-o", "nowhere/small.keras"], "There is no folder nowhere"),
        (["report", "{saved}", "--threshold", "nan"], "must be a finite number"),
        (["report", "{saved}", "--html", "page.txt"], "--html must end in .html"),
        (["report", "{saved}", "--html", "nowhere/page.html"], "There is no folder nowhere"),
        (["report", "{saved}", "--plots", "{saved}"], "--plots must be a folder"),
        (["compact", "nowhere.keras", "-o", "small.keras", "--threshold", "inf"], "must be a finite number"),
        (["demo", "--beta", "-1"], "argument --beta: must be a finite number ≥ 0. Received: -1"),
        (["demo", "--beta", "nan"], "must be a finite number ≥ 0. Received: nan"),
        (["demo", "--beta", "half"], "must be a finite number ≥ 0. Received: half"),
        (["demo", "--seed", "-1"], "must be an int from 0"),
        (["demo", "--seed", "1.5"], "must be an int from 0 to 2³² − 1. Received: 1.5"),
    ],
)
def test_bad_input(arguments, message, saved, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        main([argument.format(saved=saved) for argument in arguments])
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_help_version_and_mistakes_need_no_import():
    """The package takes seconds to import: a command that only reads its arguments leaves it alone."""
    program = """
import sys, keras_vdrop_cli
for arguments in (
    ["--help"], ["--version"], ["compact", "--help"], ["report", "nowhere.keras"], ["report"], ["report", sys.argv[1]]
):
    try:
        sys.exit(keras_vdrop_cli.main(arguments))
    except SystemExit as end:
        print(end.code)
print(sorted({"keras", "keras_vdrop", "numpy", "tensorflow"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program, __file__], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert f"keras-vdrop {kv.__version__}" in lines
    assert [line for line in lines if line.isdigit()] == ["0", "0", "0", "2", "2", "1"] and lines[-1] == "[]"
    assert f"{__file__} is not a .keras file" in done.stderr


def test_report_saves_plots_and_a_page(saved, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    page = tmp_path / "report.html"
    arguments = ["report", str(saved), "--plots", str(tmp_path / "plots"), "--html", str(page)]
    assert not main(arguments)
    images = sorted((tmp_path / "plots").iterdir())
    assert [image.name for image in images] == sorted(keras_vdrop_cli.PLOTS)
    assert all(image.read_bytes().startswith(b"\x89PNG") for image in images)
    text = page.read_text()
    assert text.count("<img ") == len(images) and "http" not in text  # the page needs no other file
    assert "<td>variational_dense</td><td>128</td><td>40</td><td>31.25</td><td>3.2x</td>" in text
    for taken in (arguments, arguments[:4]):
        with pytest.raises(SystemExit):
            main(taken)
        assert "already exists" in capsys.readouterr().err
    assert not main([*arguments, "--force"])


def test_no_colour_codes_in_a_pipe(saved, tmp_path, capsys):
    for arguments in (["report", str(saved)], ["compact", str(saved), "-o", str(tmp_path / "small.keras")]):
        main(arguments)
        assert "\x1b" not in capsys.readouterr().out


def fails_in_one_line(arguments, capsys):
    """The line, of a command that ends with exit code 1."""
    assert main([str(argument) for argument in arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def write_half(path, *args, **kwargs):
    """What a writer does on a disk that fills up."""
    with open(path, "wb") as file:
        file.write(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk(saved, tmp_path, capsys, monkeypatch):
    """What is there stays, and no half file does."""
    taken = tmp_path / "taken.keras"
    taken.write_text("precious")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(keras.Model, "save", lambda self, path, *args, **kwargs: write_half(path))
    for out in (taken, tmp_path / "new.keras", saved):
        content = saved.read_bytes()
        assert "No space left" in fails_in_one_line(["compact", saved, "-o", out, "--force"], capsys)
        assert sorted(tmp_path.iterdir()) == before
        assert taken.read_text() == "precious" and saved.read_bytes() == content


def test_full_disk_in_the_demo(tmp_path, capsys, monkeypatch):
    """Here without its training: a model or picture is whole or not there."""
    figure = pytest.importorskip("matplotlib.figure")
    from keras_vdrop.cli import demo

    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **kwargs: write_half(path))
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(2)])
    with pytest.raises(OSError, match="No space left"):
        demo.draw(model, ([1, 2], [[0.1, 0.2]] * 2, [0.1, 0.2]), 1, tmp_path / "digits.png")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["report", "compact", "demo"])
def test_read_only_target(command, saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode, **kwargs: False)  # whoever runs the tests may write anywhere
    before = sorted(tmp_path.iterdir())
    arguments = {
        "report": ["report", saved],  # which writes nothing
        "compact": ["compact", saved, "-o", tmp_path / "small.keras"],
        "demo": ["demo", "--out", tmp_path / "demo" / "again"],
    }[command]
    if command == "report":
        assert not main([str(argument) for argument in arguments])
    else:
        assert f"Cannot write to the folder {tmp_path}" in fails_in_one_line(arguments, capsys)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", ["report", "compact"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped"])
def test_damaged_model(command, damage, saved, tmp_path, capsys):
    content = saved.read_bytes()
    middle = len(content) // 2
    saved.write_bytes(
        {
            "empty": b"",
            "text": b"no model",
            "cut": content[:middle],
            "flipped": content[: middle - 200] + bytes(255 - byte for byte in content[middle - 200 :]),
        }[damage]
    )
    arguments = [command, saved] + (["-o", tmp_path / "small.keras"] if command == "compact" else [])
    assert str(saved) in fails_in_one_line(arguments, capsys)
    assert not (tmp_path / "small.keras").exists()


def test_data_that_do_not_fit(saved, tmp_path, capsys):
    np.savez(tmp_path / "two.npz", a=np.ones((2, 8)), b=np.ones((2, 8)))
    np.savez(tmp_path / "other.npz", x=np.ones((2, 5)))
    for name, message in (("two", "one array for each input: 1"), ("other", "shape")):
        line = fails_in_one_line(
            ["compact", saved, "-o", tmp_path / "small.keras", "--data", tmp_path / f"{name}.npz"], capsys
        )
        assert message in line
    assert not (tmp_path / "small.keras").exists()


def test_damaged_data(saved, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", x=np.ones((20, 8), "float32"))
    content = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(content[:60] + b"?" * 200 + content[260:])
    line = fails_in_one_line(["compact", saved, "-o", tmp_path / "small.keras", "--data", tmp_path / "x.npz"], capsys)
    assert str(tmp_path / "x.npz") in line


def test_demo_takes_another_folder_if_a_file_has_its_name(tmp_path):
    (tmp_path / "demo").write_text("")
    assert keras_vdrop_cli._nearest_folder(tmp_path / "demo") == tmp_path


def test_compact_a_variational_model_with_data(tmp_path):
    block = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, "relu"), keras.layers.Dense(3)])
    model = kv.Variational(block, kl_weight=0.1)
    x = np.ones((20, 8), "float32")
    model(x)
    np.savez(tmp_path / "x.npz", x=x)
    from keras_vdrop.cli import files

    np.testing.assert_array_equal(files.load_inputs(tmp_path / "x.npz", model), x)
    np.testing.assert_array_equal(files.load_inputs(tmp_path / "x.npz", object()), x)
