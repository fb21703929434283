"""An extension for mkdocstrings: it shows the signatures of the layers, which are composed at run time.

They stand in the stubs that `python -m tests.stubs` writes.
"""

import pathlib

import griffe


class Signatures(griffe.Extension):
    """Give every layer the parameters that its stub has."""

    def on_package(self, *, pkg, **kwargs):
        if pkg.name != "keras_vdrop":
            return
        path = pathlib.Path(pkg.filepath).parent / "layers" / "__init__.pyi"
        stubs = griffe.visit("stubs", filepath=path, code=path.read_text())
        for module in pkg["layers"].modules.values():
            for name, layer in module.classes.items():
                if name in stubs.classes and "__init__" in stubs[name].members:
                    layer.set_member("__init__", stubs[name]["__init__"])
