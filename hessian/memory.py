"""How much memory a second backward pass will need, before it is asked for."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

_SECOND_PASS = 3.0  # what two backward passes hold at their peak, in units of what the forward pass leaves saved


def available_bytes(device: torch.device) -> int | None:
    """Bytes that a computation on `device` can still use; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    amounts = [amount for amount in (_available_in_system(), _available_in_group()) if amount is not None]
    return min(amounts) if amounts else None


def _available_in_system() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _available_in_group() -> int | None:
    """What a container's control group leaves, inactive file pages counted as free."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (folder / "memory.max").read_text().strip(), int((folder / "memory.current").read_text())
        if limit == "max":
            return None
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):
        return None


def saved_bytes(forward: Callable[[], object], excluded: set[int]) -> int:
    """Bytes that autograd saves while `forward` runs: each storage once, those at an `excluded` address not at all."""
    storages: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(storages.values())


def check_fits(measure: Callable[[int], int], num_examples: int, device: torch.device, remedy: str) -> None:
    """MemoryError that names the batch size that would fit, if `num_examples` examples at once do not.

    `measure(n)`: bytes saved for n examples; asked for one and two.
    """
    available = available_bytes(device)
    if available is None:
        return
    one, two = measure(1), measure(2)
    each = max(two - one, 1)
    needed = _SECOND_PASS * (one + each * (num_examples - 1))
    if needed <= available:
        return
    fits = int((available / _SECOND_PASS - one) // each) + 1
    raise MemoryError(
        f"a batch of {num_examples} examples needs about {needed / 2**30:.1f} GiB for its second derivatives, and "
        f"{available / 2**30:.1f} GiB are free on {device}: {remedy.format(size=max(fits, 1))}"
    )
