"""Progress of work that may be done before its limit."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm


@contextmanager
def up_to(limit: int, description: str, unit: str, *, progress: bool, initial: int = 0) -> Iterator["tqdm[Any]"]:
    """A bar of at most `limit` units, full when the work is done, however few it took; one that fails stays where it is."""
    with tqdm(total=limit, desc=description, unit=unit, initial=initial, disable=not progress) as bar:
        yield bar
        if not bar.disable:
            done, started = bar.n, bar.start_t
            bar.reset(total=done)  # unlike an assignment to `total`, this reaches the bar of a notebook
            bar.start_t = started
            bar.update(done)
