"""`keras-vdrop report`: print how many weights a saved model needs, and save plots or a page of it."""

import base64
import html
import io
import os
import pathlib
from typing import Any

import keras

from keras_vdrop import plots
from keras_vdrop.cli.files import load_model
from keras_vdrop.files import replace
from keras_vdrop.pruning import COLUMNS, LayerSparsity, Sparsity, cells_of, sparsity, structure_of

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }}
th, td {{ padding: 0.3rem 0.7rem; text-align: right; border-bottom: 1px solid #8884; }}
th:first-child, td:first-child, th:last-child, td:last-child {{ text-align: left; }}
td:last-child {{ white-space: normal; }}
tr:last-child {{ font-weight: bold; }}
img {{ max-width: 100%; background: white; border-radius: 0.5rem; margin: 1rem 0; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #16181d; color: #e6e6e6; }} }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
<div class="wide"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
{figures}
</html>
"""


def run(
    path: str | os.PathLike,
    threshold: float | None = None,
    folder: str | os.PathLike | None = None,
    page: str | os.PathLike | None = None,
) -> int:
    """Print the sparsity of a saved model, and save its plots and a page if asked to.

    Args:
        path: Path of a .keras file.
        threshold: As for `sparsity`.
        folder: Folder for the plots as PNG files, or None. It is created if needed.
        page: Path of the HTML page to write, or None. The page needs no other file.

    Returns:
        The exit status, 0.

    Raises:
        OSError: If a file cannot be read or written.
        ValueError: If the model has no variational weights.
    """
    model = load_model(path)
    report = sparsity(model, threshold)
    print(report)
    images = figures(model, threshold) if folder or page else {}
    if folder:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        for name, image in images.items():
            _write(pathlib.Path(folder, f"{name}.png"), image)
    if page:
        text = page_of(pathlib.Path(path).name, report, threshold, images)
        _write(page, text.encode())
    return 0


def _write(path: str | os.PathLike, content: bytes) -> None:
    replace(path, lambda beside: beside.write_bytes(content))
    print(f"Wrote {path}.")


def figures(model: keras.Model, threshold: float | None = None) -> dict[str, bytes]:
    """Return {name: PNG bytes} of the plots of a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    images = {}
    for draw in (plots.log_alpha_by_layer, plots.weight_histogram):
        figure: Any = draw(model, threshold).figure
        file = io.BytesIO()
        figure.savefig(file, dpi=130)
        plt.close(figure)
        images[draw.__name__] = file.getvalue()
    return images


def page_of(name: str, report: Sparsity, threshold: float | None, images: dict[str, bytes]) -> str:
    """Return the text of a page with a `Sparsity`, and with images by name, which it contains."""
    total = report.total
    at = "each layer's own threshold" if threshold is None else f"a threshold of {threshold:g}"
    ratio = f" ({total.ratio:.1f}x)" if total.left else ""
    summary = f"{total.left:,} of {total.weights:,} weights are kept{ratio} at {at} on log alpha."
    return PAGE.format(
        title=html.escape(f"Weights of {name}"),
        summary=html.escape(summary),
        head="".join(f"<th>{column}</th>" for column in (*COLUMNS, "structure")),
        rows="\n".join(_row(row) for row in (*report.layers, total)),
        figures="\n".join(_image(*each) for each in images.items()),
    )


def _row(row: LayerSparsity) -> str:
    cells = (*cells_of(row), structure_of(row))
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _image(name: str, image: bytes) -> str:
    return f'<img alt="{name.replace("_", " ")}" src="data:image/png;base64,{base64.b64encode(image).decode()}">'
