r"""Batch sizes that change while a network is trained.

A policy says, before each step, how many examples it takes, what the rate is multiplied by, and which share of the examples is
made adversarial. Sizes are the base size times powers of two, up to a largest one.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

from parallel.noise_scale import NoiseScale

_MEMORY = 0.8  # of earlier measurements, in a noise scale


class Measurements(Protocol):
    """What a policy can ask of the run. Each call costs products with the Hessian, and is collective."""

    def noise_scale(self) -> NoiseScale:
        """Of the step to come."""

    def top_eigenvalue(self) -> float:
        """The largest eigenvalue of the Hessian, of some examples of the step to come."""


class BatchPolicy(ABC):
    """batch_size, rate_factor and adversarial_share are those of the next step; `state` is what a checkpoint keeps."""

    def __init__(self, base: int, largest: int) -> None:
        if largest < base:
            raise ValueError(f"the largest batch, {largest}, is smaller than the first, {base}")
        self.base, self.largest = base, largest
        self.batch_size = base
        self.rate_factor = 1.0
        self.adversarial_share = 0.0

    @abstractmethod
    def update(self, step: int, epoch: float, share: float, measurements: Measurements) -> None:
        """Before step `step`, after `epoch` passes over the data. share: of the base rate that the schedule gives this step."""

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {name: value for name, value in vars(self).items() if name not in ("base", "largest")}

    def load(self, state: Mapping[str, Any]) -> None:
        """What `state` gave."""
        vars(self).update(state)

    @property
    def can_double(self) -> bool:
        return 2 * self.batch_size <= self.largest

    def _double(self, rate: float) -> None:
        self.batch_size *= 2
        self.rate_factor *= rate


class AdaBatch(BatchPolicy):
    """Twice the batch every `epochs` passes over the data, at the same rate (Devarakonda, Naumov & Garland 2017): each example
    counts half, as if the rate had been halved."""

    def __init__(self, base: int, largest: int, epochs: float) -> None:
        super().__init__(base, largest)
        self.epochs = epochs
        self.doublings = 0

    def update(self, step: int, epoch: float, share: float, measurements: Measurements) -> None:
        del step, share, measurements
        while epoch >= (self.doublings + 1) * self.epochs:
            self.doublings += 1
            if self.can_double:
                self._double(1.0)


class GrowingBatch(BatchPolicy):
    """The batch grows instead of the rate falling (Smith et al. 2018): where the schedule would halve the rate, the batch is
    doubled, and the rate falls only by what the batch cannot take over."""

    def update(self, step: int, epoch: float, share: float, measurements: Measurements) -> None:
        del step, epoch, measurements
        if share < 1 and self.rate_factor * share <= 0.5 and self.can_double:
            self._double(2.0)


class NoiseScaleBatch(BatchPolicy):
    """The batch follows the gradient noise scale: it is doubled when the average of what is found every `steps` steps is at
    least twice as large; the rate grows by the square root.

    The noise scale is tr(Sigma) / |G|^2, whose parts are averaged separately (McCandlish et al. 2018, appendix A).
    """

    def __init__(self, base: int, largest: int, steps: int) -> None:
        super().__init__(base, largest)
        self.steps = steps
        self.trace = self.square = self.weighted_trace = self.weighted_square = 0.0

    @property
    def recommended(self) -> float:
        """tr(Sigma) / |G|^2, examples."""
        return self.trace / self.square if self.square > 0 else math.inf

    def update(self, step: int, epoch: float, share: float, measurements: Measurements) -> None:
        del epoch, share
        if step == 0 or step % self.steps:
            return
        found = measurements.noise_scale()
        for name in ("trace", "square", "weighted_trace", "weighted_square"):
            setattr(self, name, _MEMORY * getattr(self, name) + (1 - _MEMORY) * getattr(found, name))
        if 2 * self.batch_size <= self.recommended < math.inf and self.can_double:
            self._double(math.sqrt(2))


class ABSA(BatchPolicy):
    """Adaptive batch size with second-order information and adversarial training (Yao, Gholami, Keutzer & Mahoney 2018).

    Once an epoch the largest eigenvalue of the Hessian is found. When it has fallen to half of its reference, or `epochs`
    epochs after the last time in any case, batch and rate are doubled, the adversarial share is halved, and the eigenvalue is
    the new reference.
    """

    def __init__(self, base: int, largest: int, epochs: float, adversarial_share: float) -> None:
        super().__init__(base, largest)
        self.epochs, self.adversarial_share = epochs, adversarial_share
        self.reference: float | None = None
        self.seen, self.doubled = -1, 0.0

    def update(self, step: int, epoch: float, share: float, measurements: Measurements) -> None:
        del step, share
        if math.floor(epoch) == self.seen:
            return
        self.seen = math.floor(epoch)
        found = measurements.top_eigenvalue()
        if self.reference is None:
            self.reference = found
        fell = found <= self.reference / 2
        if (fell or epoch - self.doubled >= self.epochs) and self.can_double:
            self._double(2.0)
            self.adversarial_share /= 2
            self.doubled, self.reference = epoch, found
