"""Stages of a long job: timed, kept on disk, and reused by a run that resumes with the same inputs."""

import copy
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hessian.files import read_checked, write_checked
from hessian.processes import Processes

logger = logging.getLogger(__name__)


class Stages:
    """Runs stages whose results are bytes; `seconds` by stage, `reused` names those that were not run again.

    A result is kept as FOLDER/NAME-KEY with its own SHA-256 in front; KEY is a digest of the stage's inputs, so that a
    changed input, like a damaged file, leads to a new run. Of several processes, the first keeps the results; all compute
    together what is not there, and get the first one's.
    """

    def __init__(self, folder: Path, processes: Processes, *, resume: bool) -> None:
        self.folder, self.processes = folder, processes
        self.seconds: dict[str, float] = {}
        self.reused: list[str] = []
        processes.first(lambda: self._make_folder(resume))

    def alone(self) -> "Stages":
        """The same stages, times included, for this process alone."""
        other = copy.copy(self)
        other.processes = self.processes.alone()
        return other

    def run(self, name: str, inputs: Mapping[str, Any], compute: Callable[[], bytes]) -> bytes:
        """The result of the stage: read back if it is there, else computed and kept."""
        path = self.folder / f"{name}-{digest(inputs)[:16]}"
        started = time.perf_counter()
        content = self.processes.first(lambda: read_checked(path))
        if content is None:
            computed = compute()
            content = self.processes.first(lambda: self._keep(name, path, computed))
        else:
            self.reused.append(name)
            logger.info("%s: reused", name)
        self.seconds[name] = time.perf_counter() - started
        return content

    def run_json(self, name: str, inputs: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """`run` for a result that JSON can hold."""
        return json.loads(self.run(name, inputs, lambda: json.dumps(compute()).encode()))

    def _make_folder(self, resume: bool) -> None:
        if not resume:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _keep(self, name: str, path: Path, content: bytes) -> bytes:
        for old in self.folder.glob(f"{name}-*"):
            old.unlink()
        write_checked(path, content)
        return content


def digest(inputs: Mapping[str, Any]) -> str:
    """A SHA-256 of JSON-like inputs."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def bytes_digest(content: bytes) -> str:
    """A SHA-256 of a file's contents."""
    return hashlib.sha256(content).hexdigest()


def model_digest(model: nn.Module) -> str:
    """A SHA-256 of a model's parameters and buffers, with their names."""
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    return digest({name: tensors_digest([tensor]) for name, tensor in tensors.items()})


def tensors_digest(tensors: Any) -> str:
    """A SHA-256 of tensors' shapes and values."""
    result = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().view(-1)
        result.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        result.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return result.hexdigest()
