"""Results that are a picture."""

from abc import abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE = "hessian.colourblind"  # as matplotlib.style.use takes it


class Drawn:
    """A result that a notebook shows as its figure."""

    @abstractmethod
    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw it; `ax=None` makes a new figure."""

    def _repr_html_(self) -> str:
        from matplotlib import style  # slow to import, and a terminal needs none of it
        from matplotlib.figure import Figure

        from hessian.drawing import to_svg

        with style.context(STYLE):
            figure = Figure(figsize=(6, 4))
            self.plot(figure.add_subplot())
            return to_svg(figure)


def new_axes(rows: int = 0) -> "Axes":
    """The only axes of a new figure of pyplot, high enough for so many named rows."""
    from matplotlib import pyplot

    with pyplot.style.context(STYLE):
        return pyplot.subplots(figsize=(6.4, max(4.0, 1.1 + 0.2 * rows)))[1]
