"""The code in the README and in the pages of the documentation runs as it is written, and shows every public name."""

import json
import pathlib
import re

import keras
import pytest

import keras_vdrop as kv

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TENSORFLOW_ONLY = "# TensorFlow only\n"
SCRIPT = "# train.py"  # tests/test_distribution.py runs these in several processes


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """Return an empty namespace, as that of a reader who pastes a page into a new session, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return {}


@pytest.fixture
def short(monkeypatch):
    """Cut every `fit` to 3 epochs: the blocks must run, and what they learn is tested elsewhere."""
    fit = keras.Model.fit

    def cut(self, *args, epochs=1, initial_epoch=0, **kwargs):
        return fit(self, *args, epochs=min(epochs, initial_epoch + 3), initial_epoch=initial_epoch, **kwargs)

    monkeypatch.setattr(keras.Model, "fit", cut)


@pytest.mark.slow
@pytest.mark.filterwarnings("default::UserWarning")  # pages may show what a warning is about
@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page)], ids=lambda page: page.stem)
def test_blocks_run(page, names, short):
    """The blocks of a page of the site run in order, in one namespace."""
    for block in blocks(page):
        others = (SCRIPT,) if keras.backend.backend() == "tensorflow" else (SCRIPT, TENSORFLOW_ONLY)
        if not block.startswith(others):
            exec(compile(block, str(page), "exec"), names)


@pytest.mark.slow
def test_the_example_of_the_readme_learns(names):
    (block,) = blocks(ROOT / "README.md")
    exec(compile(block, "README.md", "exec"), names)
    assert (names["predicted"]["probability"].argmax(-1) == names["y_test"]).mean() > 0.9
    assert kv.sparsity(names["model"]).ratio > 5


def public():
    """Return {name in the reference: object} of everything that the package exports."""
    found = {name: getattr(kv, name) for name in kv.__all__ if not name.startswith("_")}
    del found["tfp"]
    modules = {name: found.pop(name) for name in ("losses", "metrics", "plots", "priors")}
    for path in ("functional", "scores"):
        package = found.pop(path)
        modules.update({f"{path}.{name}": getattr(package, name) for name in package.__all__})
    for path, module in modules.items():
        own = [name for name, each in vars(module).items() if getattr(each, "__module__", "") == module.__name__]
        for name in getattr(module, "__all__", [name for name in own if not name.startswith("_")]):
            found[f"{path}.{name}"] = getattr(module, name)
    return found


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "docs" / "reference.md").read_text()
    listed = {line.split(".")[-1] for line in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}
    assert [name for name in public() if name.split(".")[-1] not in listed] == []


def test_every_class_and_function_is_explained_in_a_guide():
    text = "".join(page.read_text() for page in PAGES if page.stem != "reference")
    assert [name for name in kv.__all__ if not name.startswith("_") and name not in text] == []


def test_the_citation_names_this_version():
    assert f"\nversion: {kv.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1200


@pytest.mark.any_backend
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_hold_the_outputs_of_one_run(path):
    """The site shows them. Run `python notebooks/execute.py` after a change."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        kinds = {output["output_type"] for output in cell["outputs"]}
        source = "".join(cell["source"])
        assert "error" not in kinds
        assert ("plt.show()" not in source or "display_data" in kinds) and ("print(" not in source or kinds)
