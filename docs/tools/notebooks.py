"""Hooks for `mkdocs build`: they add the notebooks to the site, with the outputs that are stored in them."""

import pathlib
import re

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[2]


@event_priority(100)  # before the plugin that turns notebooks into pages
def on_files(files, config):
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File(uri, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_content(html, page, **kwargs):
    """Let the links of notebooks to each other lead to their pages."""
    return re.sub(r'href="(\w+)\.ipynb"', r'href="../\1/"', html) if page.file.src_uri.endswith(".ipynb") else html
