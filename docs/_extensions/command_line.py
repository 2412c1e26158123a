"""The directive `command-line`: the options of an argparse parser, read from the code when the site is built."""

import argparse
import importlib
from functools import partial
from typing import Any, ClassVar

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class CommandLine(SphinxDirective):
    """`{command-line} package.module:function`, the function returning an ArgumentParser."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        module, function = self.arguments[0].split(":")
        self.env.note_dependency(importlib.import_module(module).__file__)
        parser = getattr(importlib.import_module(module), function)()
        parser.formatter_class = partial(parser.formatter_class, width=96)  # whatever the terminal's is
        usage = parser.format_usage().removeprefix("usage: ")
        result: list[nodes.Node] = [
            nodes.paragraph("", parser.description or ""),
            nodes.literal_block(usage, usage, language="text"),
        ]
        for group in parser._action_groups:
            actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
            if actions:
                result += [nodes.rubric("", group.title or ""), self.listing(parser, actions)]
        if parser.epilog:
            result.append(nodes.literal_block(parser.epilog, parser.epilog, language="text"))
        return result

    def listing(self, parser: argparse.ArgumentParser, actions: list[argparse.Action]) -> nodes.Node:
        formatter = parser._get_formatter()
        listing = nodes.definition_list()
        listing["classes"].append("options")
        for action in actions:
            text = formatter._expand_help(action) if action.help else ""
            item = nodes.definition_list_item()
            item += nodes.term("", "", nodes.literal("", formatter._format_action_invocation(action)))
            item += nodes.definition("", nodes.paragraph("", text))
            if action.choices is not None:
                item[-1] += nodes.paragraph("", f"One of: {', '.join(map(str, action.choices))}.")
            listing += item
        return listing


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
