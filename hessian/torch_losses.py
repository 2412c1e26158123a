"""The losses of torch.nn, as modules and as functions: which they are, and how they are set."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.nn import functional as F


def function_of(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The function that a partial sets options of; anything else as it is."""
    return loss.func if isinstance(loss, partial) else loss


def is_of_torch(loss: Callable[..., Any]) -> bool:
    """Whether it is a loss of torch.nn or torch.nn.functional."""
    return type(loss).__module__ == nn.modules.loss.__name__ or getattr(function_of(loss), "__module__", None) == F.__name__


def loss_name(loss: Callable[..., Any]) -> str:
    """As it is called in torch, or in the user's code."""
    return getattr(function_of(loss), "__name__", type(loss).__name__)


def is_classification(loss: Callable[..., Any]) -> bool:
    """Whether it is torch's cross-entropy or negative log-likelihood: module, function, or a partial of the function."""
    return isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) or function_of(loss) in (F.cross_entropy, F.nll_loss)


def loss_setting(loss: Callable[..., Any], name: str, default: Any) -> Any:
    """An option of a torch loss, such as `reduction`: of a module its attribute, of a partial its keyword."""
    if isinstance(loss, partial):
        return loss.keywords.get(name, default)
    return getattr(loss, name, default)
