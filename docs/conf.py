"""Sphinx: pages in MyST Markdown, the objectives' and the API's pages made from the code.

Nothing on a built page comes from the network: fonts are the system's, formulas are plain text.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE / "_make"), str(ROOT)]

import lora_dpo  # noqa: E402

project = "lora_dpo"
author = "the lora_dpo contributors"
copyright = author
version = release = lora_dpo.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "_make", "tables", "reward_kl_frontier.md", "**.ipynb_checkpoints"]

html_theme = "furo"
html_title = "lora_dpo"
html_static_path = ["_static"]
html_css_files = ["lora_dpo.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
myst_update_mathjax = False
nb_execution_mode = "off"  # the tests run the notebooks
nb_mime_priority_overrides = [("html", "text/plain", 0)]

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [
    "When to use",
    "Limits",
    "Source",
    "Differs from",
    ("Attributes", "params_style"),
]

copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True
copybutton_line_continuation_character = "\\"


def _make_pages(app: Any) -> None:
    from api_pages import write_api
    from foreign_tables import write_tables
    from objective_pages import write_pages

    write_tables(HERE / "tables")
    write_pages(HERE / "objectives")
    write_api(HERE / "api")
    notebooks = HERE / "notebooks"
    notebooks.mkdir(exist_ok=True)
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        target = notebooks / path.name
        if not target.is_file() or target.read_bytes() != path.read_bytes():
            shutil.copyfile(path, target)


def setup(app: Any) -> None:
    """Make the pages that are not written by hand, before Sphinx looks for pages."""
    app.connect("config-inited", lambda app, config: _make_pages(app))
