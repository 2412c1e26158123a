"""Figures as SVG, as PNG, and as part of a page."""

import io

import matplotlib
from matplotlib.figure import Figure

from hessian.colours import BLUE, GREEN, GREY, ORANGE, PINK

_BY_THEME = {
    "#ffffff": "paper",
    "#000000": "ink",
    "#b0b0b0": "line",  # matplotlib's grids
    BLUE: "blue",
    ORANGE: "orange",
    GREEN: "green",
    PINK: "pink",
    GREY: "grey",
}


def to_svg(figure: Figure) -> str:
    """The figure as an <svg> element with text as text, the same bytes for the same data."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hessian", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def to_inline_svg(figure: Figure) -> str:
    """`to_svg` for the inside of a page of `hessian.page`, whose style sheet says what its colours are, by day and by night."""
    text = to_svg(figure)
    for colour, name in _BY_THEME.items():
        text = text.replace(f": {colour}", f": var(--{name})")
    return text


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file of 144 dots an inch."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=144, facecolor="white", metadata={"Software": None})
    return stream.getvalue()
