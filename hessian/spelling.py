"""What a name that leads nowhere was meant to be."""

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path


def did_you_mean(word: str, names: Iterable[str], show: Callable[[str], str] = repr) -> str:
    """A hint in parentheses at the one of `names` most like `word`, whatever its case; empty where none is like it.

    >>> did_you_mean("digits-resnet2", ["digits-resnet20", "minilm"])
    " (did you mean 'digits-resnet20'?)"
    """
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f" (did you mean {show(by_lower[near[0]])}?)" if near else ""


def require_file(path: Path, what: str) -> None:
    """Raise ValueError where `path`, of a `what`, is no file; it names the one beside it that has the most similar name."""
    if path.is_file():
        return
    if path.is_dir():
        raise ValueError(f"{what} {str(path)!r} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"{what} {str(path)!r} does not exist: there is no folder {str(path.parent)!r}")
    beside = [one.name for one in path.parent.iterdir() if one.is_file()]
    hint = did_you_mean(path.name, beside, lambda name: repr(str(path.with_name(name))))
    raise ValueError(f"{what} {str(path)!r} does not exist{hint}")
