"""The website: it builds without warnings, and every link of every page leads to a page or file, and to its anchor."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

for package in ("sphinx", "myst_nb", "sphinx_book_theme", "latex2mathml"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[docs]'")

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    options = ["-E", "-W", "--keep-going", "--quiet", "-d", folder / "doctrees", "-c", "docs/site"]
    command = [sys.executable, "-m", "sphinx", *map(str, options), ".", str(folder / "html")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder / "html"


class Page(HTMLParser):
    """A page's anchors, what it links to, and what a browser loads with it."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = {""}
        self.targets: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        self.targets |= {values[key] for key in ("href", "src") if values.get(key)}
        self.loaded |= {values[key] for key in ("href", "src") if values.get(key) and tag not in ("a", "link")}
        if tag == "link" and values.get("rel") in ("stylesheet", "preload", "icon"):
            self.loaded.add(values["href"])


@cache
def page(path: Path) -> Page:
    return Page(path.read_text())


def pages(site: Path) -> list[Path]:
    return [path for path in site.rglob("*.html") if "_static" not in path.parts]


def test_every_link_leads_somewhere(site):
    broken = []
    for path in pages(site):
        for target in page(path).targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            other = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not other.is_file() or (other.suffix == ".html" and unquote(parts.fragment) not in page(other).anchors):
                broken.append(f"{path.relative_to(site)}: {target}")
    assert not broken, broken[:10]


def test_it_needs_no_other_server(site):
    """No script, style, font or image comes from elsewhere: the pages can be read offline."""
    for path in pages(site):
        outside = [x for x in page(path).loaded if x.startswith(("http:", "https:", "//"))]
        assert not outside, f"{path.relative_to(site)} loads {outside}"


@pytest.mark.parametrize("name", ["convert", "build", "load_pipeline", "compare_layers", "MMDiTRunner"])
def test_the_api_page_has_the_public_names(site, name):
    assert f"mmdit_lib.{name}" in page(site / "docs/site/api.html").anchors


def test_notebooks_show_their_results_and_hide_solutions(site):
    for notebook in sorted(ROOT.glob("notebooks/[0-9]*.ipynb")):
        text = (site / "notebooks" / f"{notebook.stem}.html").read_text()
        assert "cell_output" in text and '<img alt="' in text, notebook.name
        assert ("hide-cell" in notebook.read_text()) == ("tag_hide-cell" in text), notebook.name
