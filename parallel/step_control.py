"""What changes from step to step: the batch, the rates of layers, the share of adversarial examples."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor

from hessian.operators.curvature import CurvatureOperator
from hessian.results import LayerReport
from parallel.batch_size import ABSA, AdaBatch, BatchPolicy, GrowingBatch, Measurements, NoiseScaleBatch
from parallel.data_order import keyed_generator
from parallel.learning_rate import (
    CurvatureRates,
    layer_of,
    reported_rates,
    scaled_rate,
    scaled_warmup,
    stability_threshold,
)
from parallel.schedules import rate
from parallel.train_options import Config

_SHARE = 0.05  # of the training's time, for following the curvature of layers
_PRODUCTS = 9.0  # gradients of as many examples that an update takes as long as, on CPUs: few examples are slower each

_NOISE_STEPS = 20  # from one noise scale to the next


class Run(Measurements, Protocol):
    """What a run measures when it is asked to."""

    def curvature(self) -> CurvatureOperator:
        """The Hessian of some examples of the step to come."""


class StepControl:
    """Batch size, learning rates and adversarial share of each step, as a config has them.

    steps: of the whole run, if the batch stays as it is. size: of the training data. seconds: spent on curvature. Raises
    ValueError for batches beyond the data, for a layer report of another network, and for an optimizer whose stability is not
    known.
    """

    def __init__(
        self,
        config: Config,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, torch.Tensor],
        base_rate: float,
        steps: int,
        size: int,
    ) -> None:
        self.config, self.optimizer, self.parameters, self.steps, self.size = config, optimizer, parameters, steps, size
        self.base_rate = scaled_rate(base_rate, config.batch_size, config.base_batch, config.batch_scaling)
        self._warmup = scaled_warmup(config.warmup, config.batch_size, config.base_batch, config.batch_scaling)
        self.policy = _policy(config, size)
        self.layers: CurvatureRates | None = None
        self.fixed: dict[str, float] = {}
        if config.layer_rates == "curvature":
            self.layers = CurvatureRates(parameters, stability_threshold(optimizer), ratio=config.rate_ratio)
        elif config.layer_rates is not None:
            if not Path(config.layer_rates).is_file():
                raise ValueError(
                    f"--layer-rates {config.layer_rates}: give curvature, or a report's layers.json, which this is not"
                )
            self.fixed = reported_rates(LayerReport.load(Path(config.layer_rates)), parameters, config.rate_ratio)
        if config.find_rate and not isinstance(optimizer, torch.optim.SGD):
            raise ValueError(
                f"--find-rate knows what is stable for sgd, not for {config.optimizer}, before its first step: leave it out"
            )
        self.seconds = 0.0

    @property
    def batch_size(self) -> int:
        """Of the step to come."""
        return self.config.batch_size if self.policy is None else self.policy.batch_size

    @property
    def passes(self) -> int:
        """Among which the batch is divided: passes stay as large as they are."""
        return self.config.accumulate * (self.batch_size // self.config.batch_size)

    @property
    def adversarial_share(self) -> float:
        """Of the examples of the step to come."""
        return self.policy.adversarial_share if isinstance(self.policy, ABSA) else self.config.adversarial_share

    def update(self, step: int, examples: int, run: Run) -> None:
        """Before each step. Collective."""
        started = time.perf_counter()
        if step == 0 and self.config.find_rate:
            finder = CurvatureRates(self.parameters, stability_threshold(self.optimizer), ratio=1.0)
            finder.update(run.curvature(), None, keyed_generator("finder", self.config.seed))
            self.base_rate = finder.safe_rate if math.isfinite(finder.safe_rate) else self.base_rate
        if self.policy is not None:
            self.policy.update(step, examples / self.size, self._share(examples, warm=True), run)
        if self.layers is not None and (not self.layers.is_measured or step % self._interval() == 0):
            preconditioner = self._preconditioner()
            if preconditioner is not None or isinstance(self.optimizer, torch.optim.SGD):
                self.layers.update(run.curvature(), preconditioner, keyed_generator("rates", self.config.seed, step))
        self.seconds += time.perf_counter() - started

    def set_rates(self, examples: int, scale: float) -> float:
        """Give the optimizer's groups the rates of the step to come, times `scale`; the rate of a layer like most."""
        factor = scale * self._share(examples) * (1.0 if self.policy is None else self.policy.rate_factor)
        base = self.base_rate
        rates = {name: relative * base for name, relative in self.fixed.items()}
        if self.layers is not None and self.layers.is_measured:
            rates = self.layers.rates(base)
            base = min(self.layers.safe_rate, self.layers.ratio * base)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * rates.get(group.get("layer", ""), base)
        return factor * base

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, but for `tensors`."""
        return {
            "base_rate": self.base_rate,
            "policy": None if self.policy is None else self.policy.state(),
            "layers": None if self.layers is None else self.layers.state(),
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps besides `state`, the same on every rank."""
        if self.layers is None or self.layers.blocks is None or self.layers.whole is None:
            return {}
        return {"blocks": self.layers.blocks, "whole": self.layers.whole}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from a checkpoint."""
        self.base_rate = state["base_rate"]
        if self.policy is not None:
            self.policy.load(state["policy"])
        if self.layers is not None:
            self.layers = CurvatureRates(self.parameters, self.layers.threshold, ratio=self.layers.ratio)
            if tensors:
                self.layers.load(state["layers"], tensors["blocks"], tensors["whole"])

    def _share(self, examples: int, *, warm: bool = False) -> float:
        """Of the base rate, by the schedule; 1 in the warm-up, if it is taken to be `warm` already."""
        done = min(examples / self.config.batch_size, self.steps - 1)
        if warm and done < math.ceil(self._warmup * self.steps):
            return 1.0
        return rate(done, self.steps, self._warmup, self.config.schedule)

    def _interval(self) -> int:
        """Steps from one look at the layers' curvature to the next."""
        if self.config.measure_every is not None:
            return self.config.measure_every
        return math.ceil(_PRODUCTS * self.config.curvature_examples / (_SHARE * self.config.batch_size))

    def _preconditioner(self) -> torch.Tensor | None:
        """The diagonal by which the optimizer divides its steps, (P,); None where there is none, or none yet."""
        if not any("exp_avg_sq" in state for state in self.optimizer.state.values()):
            return None
        parts = []
        for parameter in self.parameters.values():
            state = self.optimizer.state.get(parameter, {})
            if "exp_avg_sq" not in state:  # the loss does not depend on it
                parts.append(torch.ones(parameter.numel(), dtype=parameter.dtype, device=parameter.device))
                continue
            group = next(one for one in self.optimizer.param_groups if any(parameter is other for other in one["params"]))
            square = state["exp_avg_sq"]
            square = square.full_tensor() if isinstance(square, DTensor) else square
            corrected = square / (1 - group["betas"][1] ** float(state["step"]))
            parts.append((corrected.sqrt() + group["eps"]).reshape(-1))
        return torch.cat(parts)


def _policy(config: Config, size: int) -> BatchPolicy | None:
    if config.adaptive_batch is None:
        return None
    base = config.batch_size
    largest = min(16 * base, size) if config.largest_batch is None else config.largest_batch
    if largest > size:
        raise ValueError(f"--largest-batch {largest}: the training data has {size} examples")
    match config.adaptive_batch:
        case "noise-scale":
            return NoiseScaleBatch(base, largest, config.measure_every or _NOISE_STEPS)
        case "adabatch":
            return AdaBatch(base, largest, config.doubling_epochs)
        case "growing":
            return GrowingBatch(base, largest)
    return ABSA(base, largest, config.doubling_epochs, config.adversarial_share)


def by_layer(names: list[str]) -> dict[str, list[str]]:
    """Names of parameters, by their layers."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(layer_of(name), []).append(name)
    return found
