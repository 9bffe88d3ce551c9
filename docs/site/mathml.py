"""A Sphinx extension: formulas as MathML, which browsers show without a script from another server."""

from __future__ import annotations

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

log = logging.getLogger(__name__)


def inline(self, node) -> None:
    self.body.append(as_mathml(node, "inline"))
    raise nodes.SkipNode


def block(self, node) -> None:
    self.body.append(f'<div class="math-block">{as_mathml(node, "block")}</div>')
    raise nodes.SkipNode


def as_mathml(node, display: str) -> str:
    found = convert(node.astext(), display=display)
    if "\\" in found:  # an unknown command is left as it is
        log.warning("this formula has a command that latex2mathml does not know: %s", node.astext(), location=node)
    return found


def setup(app) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))
    return {"parallel_write_safe": True}
