"""Results that are a picture."""

from abc import abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Drawn:
    """A result that a notebook shows as its figure."""

    @abstractmethod
    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw it; `ax=None` makes a new figure."""

    def _repr_html_(self) -> str:
        from matplotlib.figure import Figure  # slow to import, and a terminal needs none of it

        from hessian.drawing import to_svg

        figure = Figure(figsize=(6, 4), layout="constrained")
        self.plot(figure.add_subplot())
        return to_svg(figure)


def new_axes() -> "Axes":
    """The only axes of a new figure of pyplot."""
    from matplotlib import pyplot

    return pyplot.subplots(layout="constrained")[1]
