"""A Sphinx extension: relative links to source files and folders lead to pages of the website that show them.

It also takes the anchors of JupyterLab, `#Exercise-1`, for those of GitHub, `#exercise-1`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import posixpath
import re
from collections.abc import Iterator
from functools import cached_property
from html import escape
from pathlib import Path
from urllib.parse import unquote

from docutils import nodes
from myst_parser.mdit_to_docutils.base import default_slugify
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx.addnodes import download_reference, pending_xref
from sphinx.transforms.post_transforms import SphinxPostTransform

ROOT = Path(__file__).resolve().parents[2]
PAGES = "source"
"""The folder of these pages."""
SHOWN = {".py", ".pyi", ".toml", ".txt", ".yml", ""}
"""Suffixes of the files that are shown; links to others download them."""
ALWAYS = "mmdit_lib"
"""The package whose files all have pages; other files have one if they are linked to."""


def page_of(path: Path) -> str:
    name = posixpath.join(PAGES, path.relative_to(ROOT).as_posix())
    return posixpath.join(name, "index") if path.is_dir() else name


class LocalLinks(SphinxPostTransform):
    """Runs before MyST resolves links to documents, and reports those that lead nowhere."""

    default_priority = 5

    def run(self, **kwargs) -> None:
        for node in list(self.document.findall(lambda n: isinstance(n, (download_reference, pending_xref)))):
            if node.get("reftype") == "myst":
                self.lead(node)

    def lead(self, node) -> None:
        target, _, anchor = node["reftarget"].partition("#")
        if node["refdomain"] == "doc":
            node["reftargetid"] = self.known(node["reftarget"], node["reftargetid"])
        elif path := self.shown(node, target):
            self.app.env.source_pages.add(path)
            uri = self.app.builder.get_relative_uri(self.env.docname, page_of(path))
            link = nodes.reference("", "", *node.children, refuri=uri + anchor.replace("L", "#L-"), internal=True)
            node.replace_self(link)
        elif self.known(self.env.docname, target) != target:
            named = {"reftarget": self.env.docname, "reftargetid": self.known(self.env.docname, target)}
            node.update_all_atts({"refdomain": "doc", **named}, replace=True)

    def shown(self, node, target: str) -> Path | None:
        """The file or folder, if it is one to show."""
        _, found = self.env.relfn2path(unquote(target), self.env.docname)
        path = Path(found).resolve()
        folder = path.is_dir() and isinstance(node, pending_xref) and path != ROOT
        return path if folder or (path.is_file() and path.suffix in SHOWN) else None

    def known(self, document: str, anchor: str | None) -> str | None:
        """The anchor in GitHub's form if only that is a heading's in this document."""
        slugs = self.env.metadata[document].get("myst_slugs", {}) if document in self.env.metadata else {}
        slug = default_slugify(unquote(anchor)) if anchor else anchor
        return slug if slug in slugs and anchor not in slugs else anchor


# The pages -------------------------------------------------------------------------------------------


def pages(app) -> Iterator[tuple[str, dict[str, str], str]]:
    linked = {path for path in app.env.source_pages if path.is_file()}
    files = sorted(linked | set((ROOT / ALWAYS).rglob("*.py")))
    folders = {folder for file in files for folder in file.parents if folder.is_relative_to(ROOT) and folder != ROOT}
    shown = {file: as_html(file) for file in files}
    shown |= {folder: listing(folder, files) for folder in folders | (app.env.source_pages - linked)}
    for path, body in shown.items():
        yield page_of(path), {"title": path.name, "body": heading(path) + body}, "page.html"


def heading(path: Path) -> str:
    """The path; each of its folders is a link."""
    parts = path.relative_to(ROOT).parts
    up = len(parts) - 1 + path.is_dir()
    links = [f'<a href="{"../" * (up - i - 1)}index.html">{part}</a>/' for i, part in enumerate(parts[:-1])]
    return f'<h1 class="source-path">{"".join(links)}{parts[-1]}{"/" if path.is_dir() else ""}</h1>'


def as_html(file: Path) -> str:
    try:
        lexer = get_lexer_for_filename(file.name)
    except ClassNotFound:
        lexer = TextLexer()
    return highlight(file.read_text(), lexer, HtmlFormatter(cssclass="highlight", lineanchors="L"))


def listing(folder: Path, files: list[Path]) -> str:
    """A table of the files and folders in a folder that have pages, and the first lines of their docstrings."""
    inside = sorted({folder / file.relative_to(folder).parts[0] for file in files if file.is_relative_to(folder)})
    rows = []
    for path in inside:
        link = f"{path.name}/index.html" if path.is_dir() else f"{path.name}.html"
        first = escape(summary(path / "__init__.py" if path.is_dir() else path))
        first = re.sub(r"`([^`]*)`", r"<code>\1</code>", first)
        rows.append(f'<tr><td><a href="{link}">{path.name}{"/" * path.is_dir()}</a></td><td>{first}</td></tr>')
    return f'<table class="source-list">{"".join(rows)}</table>'


def summary(file: Path) -> str:
    if file.suffix != ".py" or not file.is_file():
        return ""
    return (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n\n")[0]


def linkcode_resolve(domain: str, names: dict[str, str]) -> str | None:
    """Where the API page's `[source]` leads: a line of a page, as seen from docs/site/."""
    found = importlib.import_module(names["module"])
    for name in names["fullname"].split("."):
        found = inspect.getattr_static(found, name, None) if inspect.isclass(found) else getattr(found, name, None)
        if isinstance(found, (property, cached_property, classmethod, staticmethod)):
            found = getattr(found, "fget", None) or getattr(found, "func", None) or found.__func__
    if not inspect.isclass(found) and not inspect.isroutine(found):
        return None
    found = inspect.unwrap(found)
    file, (_, line) = Path(inspect.getsourcefile(found)), inspect.getsourcelines(found)
    return f"../../{page_of(file)}.html#L-{line}" if file.is_relative_to(ROOT) else None


def setup(app) -> dict[str, bool]:
    app.connect("builder-inited", lambda app: setattr(app.env, "source_pages", set()))
    app.connect("html-collect-pages", pages)
    app.add_post_transform(LocalLinks)
    return {"parallel_write_safe": False}
