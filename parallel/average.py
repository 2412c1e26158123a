"""An exponential moving average of a model's weights."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch.distributed.tensor import DTensor


class WeightAverage:
    """The average of `tensors` (which change in place): after update t, decay is min(`decay`, (1 + t) / (10 + t)).

    Tensors that are no floating-point numbers, such as counters, are taken as they are.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], decay: float) -> None:
        self._live = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        self.decay = decay
        self.tensors = {name: tensor.clone() for name, tensor in self._live.items()}

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Take in the current values, which are those after `count` steps."""
        decay = min(self.decay, (1 + count) / (10 + count))
        torch._foreach_lerp_(_own(self.tensors), _own(self._live), 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average's weights inside."""
        live = _own(self._live)
        before = [tensor.clone() for tensor in live]
        with torch.no_grad():
            torch._foreach_copy_(live, _own(self.tensors))
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(live, before)


def _own(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """This rank's parts, which change with the whole."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]
