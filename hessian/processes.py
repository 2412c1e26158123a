"""The processes of a run: how they meet, agree, and find out who is missing."""

import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import distributed, nn
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]  # documented all the same
from torch.distributed.rendezvous import rendezvous

_Value = TypeVar("_Value")

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # that torchrun sets
_PATIENCE = timedelta(seconds=10)  # for rank 0 to fail as others have


class RankLostError(RuntimeError):
    """Other ranks wait for one that does not answer; the text names it."""


class FirstRankError(RuntimeError):
    """Rank 0 failed, and says why itself."""


@dataclass(frozen=True)
class Processes:
    """This process among all. store: what they can read of each other at any time. restarts: of the whole, by torchrun."""

    rank: int
    world_size: int
    device: torch.device
    store: Store
    restarts: int

    def at(self, step: int, doing: str) -> None:
        """Let the others know how far this rank has come."""
        if self.world_size > 1:
            self.store.set(f"rank{self.rank}", json.dumps([step, doing]))

    def broadcast(self, model: nn.Module) -> None:
        """Collective: rank 0's parameters and buffers become those of all."""
        if self.world_size > 1:
            for tensor in model.state_dict(keep_vars=True).values():
                distributed.broadcast(tensor.detach(), 0)

    def first(self, compute: Callable[[], _Value]) -> _Value:
        """Collective: what `compute` returns on rank 0, which alone calls it; its error is a FirstRankError on the others.
        Picklable values."""
        if self.world_size == 1:
            return compute()
        value, failure = None, None
        if self.rank == 0:
            try:
                value = compute()
            except Exception as error:
                failure = error
        told: list[Any] = [(value, None if failure is None else str(failure))]
        distributed.broadcast_object_list(told)
        if failure is not None:
            raise failure
        value, text = told[0]
        if text is not None:
            raise FirstRankError(text)
        return value

    def alone(self) -> "Processes":
        """This process by itself, for what it does without the others."""
        return replace(self, rank=0, world_size=1)

    def tell_failure(self, text: str) -> None:
        """On rank 0: let the others know what it has said of its end."""
        self.store.set("failure", text)

    def is_told(self, text: str) -> bool:
        """On another rank: whether rank 0 says the same, waiting for it, since torchrun ends all as soon as one has failed."""
        try:
            self.store.wait(["failure"], _PATIENCE)
            told = self.store.get("failure").decode()
            return text in told or told in text
        except RuntimeError:  # rank 0 has not failed so far, or the store is gone with it
            return False

    def introduce(self) -> None:
        """Let the others know where this rank runs."""
        self.store.set(f"host{self.rank}", f"{socket.gethostname()}, process {os.getpid()}")
        self.at(0, "starting")

    def lagging(self, phases: tuple[str, ...]) -> str:
        """The ranks that are behind the others and where they are; empty where all have come equally far. `phases`: what is
        done in a step, in order."""
        seen = {rank: self._read(f"rank{rank}") for rank in range(self.world_size)}
        places = {rank: (-1, "") if text is None else tuple(json.loads(text)) for rank, text in seen.items()}
        order = {rank: (step, phases.index(doing) if doing in phases else -1) for rank, (step, doing) in places.items()}
        last = min(order.values())
        if last == max(order.values()):
            return ""
        found = []
        for rank, (step, doing) in places.items():
            if order[rank] == last:
                where = self._read(f"host{rank}")
                state = "never started" if where is None else f"{where}, stopped in step {step} while {doing}"
                found.append(f"rank {rank} ({state})")
        return ", ".join(found)

    def agree(self, config: Mapping[str, Any]) -> None:
        """Collective: ValueError that names the first field in which ranks differ."""
        if self.world_size == 1:
            return
        everybody: list[Any] = [None] * self.world_size
        distributed.all_gather_object(everybody, dict(config))
        for rank, other in enumerate(everybody):
            for name in everybody[0]:
                if other.get(name) != everybody[0][name]:
                    raise ValueError(
                        f"rank {rank} has {name} = {other.get(name)!r}, rank 0 {everybody[0][name]!r}: start all ranks alike"
                    )

    def _read(self, key: str) -> str | None:
        return self.store.get(key).decode() if self.store.check([key]) else None


def one_process(device: torch.device | str = "cpu") -> Processes:
    """A process that is not one of many."""
    return Processes(0, 1, torch.device(device), HashStore(), 0)


def leave(code: int) -> NoReturn:
    """End this process, under torchrun at once. A gloo group's threads can abort the interpreter while it shuts down (pytorch
    issue 179291), and torchrun would take that for a failure."""
    if "WORLD_SIZE" not in os.environ:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def joined(device: str = "cpu", timeout: float = 600.0, *, always: bool = True) -> Iterator[Processes]:
    """All processes of this torchrun as the default group, or this one alone. timeout: seconds that a message may take.
    always: make a group of one process, too.

    Raises ValueError where the environment names only part of what ranks need to meet, for a port in use, and for a device
    that is not there.
    """
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if 0 < len(missing) < len(_VARIABLES):
        there = ", ".join(name for name in _VARIABLES if name not in missing)
        raise ValueError(f"the environment has {there} but not {', '.join(missing)}: start with torchrun, or unset them")
    place = _device(device)
    backend = "gloo"
    if place.type == "cuda":
        torch.cuda.set_device(place)
        backend = "cpu:gloo,cuda:nccl"
    if missing and not always:
        yield one_process(place)
        return
    limit = timedelta(seconds=timeout)
    store: Store
    if missing:
        store, rank, world_size = HashStore(), 0, 1
    else:
        try:
            store, rank, world_size = next(iter(rendezvous("env://", timeout=limit)))
        except distributed.DistNetworkError as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise ValueError(
                f"ranks cannot meet at {address} (another program's port? choose one by --master-port): {error}"
            ) from error
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    store = PrefixStore(f"start{restarts}", store)  # torchrun may keep the store, in which dead ranks left their addresses
    group_store = PrefixStore("group", store)
    distributed.init_process_group(backend, store=group_store, rank=rank, world_size=world_size, timeout=limit)
    found = Processes(rank, world_size, place, PrefixStore("run", store), restarts)
    try:
        found.introduce()
        yield found
    finally:
        distributed.destroy_process_group()


def _device(name: str) -> torch.device:
    """This process's device of that kind; ValueError where the machine has none."""
    try:
        place = torch.device(name)
        if place.type != "cuda":
            torch.zeros(1, device=place).item()  # this torch may know devices that are not here
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: there is no such device here: give cpu or cuda") from error
    if place.type != "cuda":
        return place
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this machine has no CUDA device")
    number, count = int(os.environ.get("LOCAL_RANK", place.index or 0)), torch.cuda.device_count()
    if number >= count:
        raise ValueError(f"--device {name}: this process would take CUDA device {number}, and those here are 0 to {count - 1}")
    return torch.device("cuda", number)
