"""The documentation site: `make docs` builds it into docs/_build/html, every warning being an error."""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent / "_extensions")]

_project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

project = _project["name"]
release = version = _project["version"]
copyright = "the hessianware authors"  # noqa: A001  # the name that Sphinx reads

extensions = ["myst_parser", "sphinx.ext.autodoc", "mathml", "command_line", "public_names"]
exclude_patterns = ["_build"]
nitpicky = True
nitpick_ignore_regex = [
    # Libraries whose pages an offline build cannot look up, and type aliases that are not public.
    (r"py:.*", r"(torch|scipy|tqdm|nn|numpy|np|matplotlib|collections|pathlib|os|typing|abc|fx|distributed|plt)\..*"),
    (r"py:.*", r"(hessian|hawq|parallel)\..*\._[A-Z]\w*"),
    (r"py:.*", r"(Tensor|Path|Any|Sequence|Iterable|Mapping|Callable|Axes|Literal|TextIO|optional)"),
]

myst_enable_extensions = ["amsmath", "deflist", "dollarmath", "colon_fence"]
myst_heading_anchors = 3

default_role = "code"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 96
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"hessianware {version}"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False

linkcheck_ignore = [r"https://doi\.org/.*"]  # publishers turn away what is no browser
linkcheck_timeout = 20
