"""Results as one self-contained page: nothing is loaded, and it can be read on a telephone, by day and by night."""

from typing import Any

import jinja2


def render_page(package: str, template: str, **values: Any) -> str:
    """The page of a Jinja template beside `package`'s modules, which extends page.html.jinja; `values` are its variables."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package, ""), jinja2.PackageLoader("hessian", "")]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["digits"] = lambda value, places=4: "" if value is None else f"{value:.{places}g}"
    return environment.get_template(template).render(**values)
