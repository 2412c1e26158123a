"""What a name that leads nowhere was meant to be."""

import difflib
from collections.abc import Callable, Iterable


def did_you_mean(word: str, names: Iterable[str], show: Callable[[str], str] = repr) -> str:
    """A hint in parentheses at the one of `names` most like `word`, whatever its case; empty where none is like it.

    >>> did_you_mean("digits-resnet2", ["digits-resnet20", "minilm"])
    " (did you mean 'digits-resnet20'?)"
    """
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f" (did you mean {show(by_lower[near[0]])}?)" if near else ""
