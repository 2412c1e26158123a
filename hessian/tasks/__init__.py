"""Built-in tasks: small, real, offline. Each trains its network on first use and keeps it in the user's cache."""

from hessian.tasks.digits import digits_mobilenet, digits_resnet20

BUILT_IN = {"digits-resnet20": digits_resnet20, "digits-mobilenet": digits_mobilenet}

__all__ = ["BUILT_IN", "digits_mobilenet", "digits_resnet20"]
