"""The losses of torch.nn, as modules and as functions: which they are, and how they are set."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.nn import functional as F


def is_classification(loss: Callable[..., Any]) -> bool:
    """Whether it is torch's cross-entropy or negative log-likelihood: module, function, or a partial of the function."""
    function = loss.func if isinstance(loss, partial) else loss
    return isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) or function in (F.cross_entropy, F.nll_loss)


def loss_setting(loss: Callable[..., Any], name: str, default: Any) -> Any:
    """An option of a torch loss, such as `reduction`: of a module its attribute, of a partial its keyword."""
    if isinstance(loss, partial):
        return loss.keywords.get(name, default)
    return getattr(loss, name, default)
