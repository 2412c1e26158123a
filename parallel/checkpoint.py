"""Checkpoints of a run: written beside the training by all ranks, published whole or not at all, read by any number."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from hessian.files import write_atomically

FORMAT, VERSION = "hessianware-training", 1

_UNFINISHED = "unfinished"
_RUN = "run.json"

Tensors = dict[str, torch.Tensor]

logger = logging.getLogger(__name__)


class DamagedCheckpointError(RuntimeError):
    """A checkpoint that was complete cannot be read any more; the text says which and why."""


class Checkpoints:
    """The folder of a run's checkpoints, of which the newest `keep` stay. Collective: made and used by all ranks alike.

    A checkpoint is a folder `step-NNNNNNNN`, as torch.distributed.checkpoint writes it (plain tensors are taken to be the
    same on every rank, DTensors keep their parts), with what is no tensor in run.json. It gets this name when all ranks have
    written their parts, so a folder of this name is complete.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep
        self._group = distributed.new_group(backend="gloo")  # its messages must not mix with those of the training
        self._is_first = distributed.get_rank() == 0
        self._under_way: tuple[Future[Any], int] | None = None

    def steps(self) -> list[int]:
        """The steps with a complete checkpoint, as rank 0 sees them, newest first."""
        names = self.folder.glob(f"step-*/{_RUN}") if self._is_first else ()
        found = [sorted((int(path.parent.name.removeprefix("step-")) for path in names), reverse=True)]
        distributed.broadcast_object_list(found, group=self._group, group_src=0)
        return found[0]

    def save(self, step: int, tensors: Tensors, run: Mapping[str, Any]) -> None:
        """Begin to write; the tensors may change as soon as this returns. Waits for the checkpoint before, if need be."""
        self.finish()
        target = self.folder / _UNFINISHED
        if self._is_first:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            content = {"format": FORMAT, "version": VERSION, "step": step, "torch": torch.__version__, **run}
            write_atomically(target / _RUN, json.dumps(content, indent=1, allow_nan=False) + "\n")
        distributed.barrier(self._group)
        future = async_save(tensors, checkpoint_id=target, process_group=self._group)
        assert isinstance(future, Future)
        self._under_way = future, step

    def poll(self) -> None:
        """Publish what is under way, if it is complete. Of this rank alone, and cheap: to be called often."""
        if self._under_way is not None and self._under_way[0].done():
            self._publish()

    def finish(self) -> None:
        """Wait until what is under way is complete and published; its errors are raised here."""
        if self._under_way is not None:
            self._publish()
        distributed.barrier(self._group)

    def read_run(self, step: int) -> dict[str, Any]:
        """What is no tensor in a checkpoint, as rank 0 reads it. ValueError for a file of another kind or version,
        DamagedCheckpointError for one that cannot be read."""
        path = self._path(step) / _RUN
        found: list[Any] = [None]
        if self._is_first:
            try:
                found = [json.loads(path.read_text())]
            except (OSError, json.JSONDecodeError) as error:
                found = [str(error)]
        distributed.broadcast_object_list(found, group=self._group, group_src=0)
        run = found[0]
        if not isinstance(run, dict):
            raise DamagedCheckpointError(f"{path}: {run}")
        if run.get("format") != FORMAT or run.get("version") != VERSION:
            raise ValueError(f"{path} is no {FORMAT} of version {VERSION}")
        return run

    def load(self, step: int, make: Callable[[str, torch.Size, torch.dtype], torch.Tensor]) -> Tensors:
        """The tensors of a checkpoint, by name, each into what `make(name, shape, dtype)` returns for it."""
        path = self._path(step)
        try:
            metadata = FileSystemReader(path).read_metadata().state_dict_metadata
        except Exception as error:  # a damaged index can make the reader fail in any way
            raise DamagedCheckpointError(f"the index of {path}: {error}") from error
        tensors = {
            name: make(name, item.size, item.properties.dtype)
            for name, item in metadata.items()
            if isinstance(item, TensorStorageMetadata)
        }
        try:
            load(tensors, checkpoint_id=path, process_group=self._group)
        except CheckpointException as error:
            raise DamagedCheckpointError(f"{path}: {error}") from error
        return tensors

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _publish(self) -> None:
        assert self._under_way is not None
        (future, step), self._under_way = self._under_way, None
        future.result()  # on rank 0, which collects what the others report, this is when all have written
        if not self._is_first:
            return
        target = self._path(step)
        shutil.rmtree(target, ignore_errors=True)  # of an earlier pass over the same steps
        os.replace(self.folder / _UNFINISHED, target)
        for path in sorted(self.folder.glob("step-*"))[: -self.keep]:
            shutil.rmtree(path)


def check_space(folder: Path, needed: int) -> None:
    """Raise ValueError where nothing can be written to `folder`, or fewer than `needed` bytes are free there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ".writable", "")
        (folder / ".writable").unlink()
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written to: {error.strerror}") from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"--out {folder}: checkpoints need about {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free: "
            "name another folder, or keep fewer (--keep)"
        )
