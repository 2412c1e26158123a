"""Built-in tasks: small, real, offline. Each trains its network on first use and keeps it in the user's cache."""

from hessian.tasks import minilm
from hessian.tasks.digits import digits_mobilenet, digits_resnet20
from hessian.tasks.efficientnet import efficientnet_lite1
from hessian.tasks.text import text_transformer

BUILT_IN = {
    "digits-resnet20": digits_resnet20,
    "digits-mobilenet": digits_mobilenet,
    "text-transformer": text_transformer,
    "minilm": minilm.minilm,
    "efficientnet-lite1": efficientnet_lite1,
}

__all__ = ["BUILT_IN", "digits_mobilenet", "digits_resnet20", "efficientnet_lite1", "minilm", "text_transformer"]
