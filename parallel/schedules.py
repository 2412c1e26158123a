"""The learning rate over a run, as a share of the base rate."""

import math
from collections.abc import Callable

SCHEDULES: dict[str, Callable[[float], float]] = {  # from the share of the run behind the warm-up that is done
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda _: 1.0,
}


def rate(step: float, steps: int, warmup: float, schedule: str) -> float:
    """The share for step 0 .. `steps` - 1, of which the first `warmup` (a share of all) lead up to 1, linearly.

    >>> [round(rate(step, 4, 0.5, "linear"), 3) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    first = math.ceil(warmup * steps)
    if step < first:
        return (step + 1) / first
    return SCHEDULES[schedule]((step - first) / (steps - first))
