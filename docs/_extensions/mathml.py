"""Formulas as MathML, which browsers set by themselves: pages need no script and no network."""

import re
from typing import Any

from docutils import nodes
from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)

_STYLES = {"double-struck": 0x1D538, "script": 0x1D49C}  # where Unicode has their capital A: browsers know no such style
_STYLED = re.compile(rf'(?<=<mi) mathvariant="({"|".join(_STYLES)})">([A-Z])')
_LARGE_ANGLE = re.compile(r"\\[bB]igg?[lr]?(\\[lr]angle)")  # which the converter knows in one size


def to_mathml(latex: str, node: nodes.Node, display: str) -> str:
    """The formula as a <math> element; a warning where the converter does not know it."""
    known = _LARGE_ANGLE.sub(r"\1", " ".join(latex.split()).replace(r"\|", r"\Vert "))
    try:
        mathml = convert(known, display=display)
    except Exception as error:  # the converter has many kinds
        mathml = f"<code>{error}</code>"
        logger.warning("no formula: %s in %s", error, latex, location=node)
    mathml = _STYLED.sub(lambda found: ">" + chr(_STYLES[found[1]] + ord(found[2]) - ord("A")), mathml)
    if "\\" in mathml:
        logger.warning("an unknown command in the formula %s", latex, location=node)
    return mathml


def visit_inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(to_mathml(node.astext(), node, "inline"))
    raise SkipNode


def visit_block(translator: Any, node: Any) -> None:
    latex = node.astext()
    if "\\\\" in latex and "\\begin" not in latex:
        latex = rf"\begin{{aligned}} {latex} \end{{aligned}}"
    translator.body.append(f'<div class="formula">{to_mathml(latex, node, "block")}</div>\n')
    raise SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
