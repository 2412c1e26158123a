"""Docstrings of the public names: their plain text is made safe for reStructuredText, references to where an object is
defined lead to where it is public."""

import importlib
import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

PACKAGES = ("hessian", "hawq", "parallel")

_VERBATIM = re.compile(r"(``.*?``|:\w+:`[^`]*`|`[^`]*`)")  # literals and formulas


def public_names() -> dict[str, str]:
    """Where each public object is defined, and its public name."""
    found = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            item = getattr(module, name)
            if hasattr(item, "__qualname__"):
                found[f"{item.__module__}.{item.__qualname__}"] = f"{package}.{name}"
    return found


def escape(*arguments: Any) -> None:
    """For `autodoc-process-docstring`: |x| is a norm, not a substitution, outside of formulas and literals."""
    lines: list[str] = arguments[-1]
    formula = None  # indentation of the formula that a line is in
    verbatim = False
    for position, line in enumerate(lines):
        indentation = len(line) - len(line.lstrip())
        if formula is not None and line.strip() and indentation <= formula:
            formula = None
        if line.lstrip().startswith(".. math::"):
            formula = indentation
        if line.lstrip().startswith(">>>"):
            verbatim = True
        elif not line.strip():
            verbatim = False
        if formula is None and not verbatim:
            parts = _VERBATIM.split(line)
            parts[::2] = [re.sub(r"(?<!\\)([|])", r"\\\1", part) for part in parts[::2]]
            lines[position] = "".join(parts)


def resolve(app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, contnode: nodes.Node) -> nodes.Node | None:
    """A reference to the place of definition, as annotations give it, is one to the public name."""
    target = node.get("reftarget")
    name = app.config.public_names.get(target)
    if name is None or node.get("refdomain") != "py":
        return None
    domain = env.domains["py"]
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, contnode)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("public_names", public_names(), "env")
    app.connect("autodoc-process-docstring", escape)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
