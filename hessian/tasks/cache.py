"""Weights of the built-in tasks: trained once, deterministically, and kept in the user's cache with a checksum."""

import hashlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.utils.data import TensorDataset

from hessian.files import read_checked, write_checked

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """$HESSIANWARE_CACHE, or the folder `hessianware` where this system keeps caches."""
    if os.environ.get("HESSIANWARE_CACHE"):
        return Path(os.environ["HESSIANWARE_CACHE"]).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "hessianware"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "hessianware"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hessianware"


def cached_weights(name: str, described: str, train: Callable[[], nn.Module]) -> dict[str, torch.Tensor]:
    """The state dict of the module that `train()` returns, from the cache if it is there and whole.

    `name` begins the file's name; `described` says all that the weights depend on (recipe, shapes, data).
    """
    path = cache_folder() / f"{name}-{hashlib.sha256(described.encode()).hexdigest()[:8]}"
    content = read_checked(path)
    if content is None:
        with torch.inference_mode(False), torch.enable_grad():
            trained = train()
        content = safetensors.torch.save({key: value.contiguous() for key, value in trained.state_dict().items()})
        try:
            write_checked(path, content)
        except OSError as error:
            logger.warning("cannot keep the trained network in %s (%s): next time it is trained anew", path.parent, error)
    return safetensors.torch.load(content)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the state dict."""
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def checksum(data: TensorDataset) -> str:
    """The SHA-256 of all that a data set holds."""
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in data.tensors)).hexdigest()
