"""Run notebooks from top to bottom: `python notebooks/execute.py [--check] NOTEBOOK ...`.

It writes the outputs into the files; with `--check`, it only fails where a cell does. It prints the seconds that each
notebook took: below 180 on an idle machine.
"""

import argparse
import pathlib
import sys
import time

import nbformat
from nbclient import NotebookClient


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="+", type=pathlib.Path)
    parser.add_argument("--check", action="store_true", help="leave the files as they are")
    options = parser.parse_args()
    for path in options.notebooks:
        notebook = nbformat.read(path, as_version=4)
        start = time.monotonic()
        NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
        seconds = time.monotonic() - start
        for cell in notebook.cells:  # what the backends log of the machine is no output
            outputs = cell.get("outputs", [])
            cell["outputs"] = [output for output in outputs if output.get("name") != "stderr"]
            if cell.cell_type != "code":
                del cell["outputs"]
        if not options.check:
            nbformat.write(notebook, path)
        print(f"{path}: ran in {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
