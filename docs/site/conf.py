"""The website (`make docs`): Sphinx reads the repository itself, so links between files work as they do there."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from source_pages import linkcode_resolve  # noqa: E402, F401

import mmdit_lib  # noqa: E402

project = html_title = "mmdit_lib"
version = release = mmdit_lib.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.linkcode",
    "source_pages",
    "mathml",
]

root_doc = "README"
include_patterns = [
    "README.md",
    "SECURITY.md",
    "docs/**.md",
    "notebooks/[0-9]*.ipynb",
    "benchmarks/results/*.md",
    "mmdit_lib/tiny/**.md",
]
exclude_patterns = [".*", "_site", "jupyter_execute", "build", "dist", "tests", "training"]  # not searched
exclude_patterns += ["notebooks/work", "**/.*"]

nb_execution_mode = "off"  # the notebooks are committed executed
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

default_role = "literal"  # single backticks in docstrings
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True  # as they are written, not the values on the machine that builds the website
napoleon_use_rtype = False

html_math_renderer = "mathml"
html_theme = "sphinx_book_theme"
html_theme_options = {
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the search field is in the sidebar
    "content_footer_items": [],
}
html_sidebars = {"source/**": ["navbar-logo.html", "search-button-field.html"]}
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

CONTENTS = """
```{toctree}
:hidden:
:glob:
:caption: Notebooks

notebooks/*
```

```{toctree}
:hidden:
:caption: Guides

docs/features
docs/fp8
docs/from-tensorrt-llm
docs/several-machines
docs/serving
docs/faults
docs/extending
docs/tested
docs/resolved-environments
SECURITY
```

```{toctree}
:hidden:
:glob:
:caption: Results

benchmarks/results/*
mmdit_lib/tiny/*/MODEL_CARD
```

```{toctree}
:hidden:
:caption: Reference

docs/glossary
docs/site/api
```
"""


def add_contents(app, docname: str, source: list[str]) -> None:
    """The README is the front page; only there does it have a table of contents."""
    if docname == root_doc:
        source[0] += CONTENTS


def add_index(app, error) -> None:
    """What a web server shows for the folder."""
    front = Path(app.outdir, f"{root_doc}.html")
    if front.is_file():
        Path(app.outdir, "index.html").write_bytes(front.read_bytes())


def setup(app) -> None:
    app.connect("source-read", add_contents)
    app.connect("build-finished", add_index)
