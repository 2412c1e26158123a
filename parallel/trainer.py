"""Training steps that many processes take as one: the same examples, the same loss, the same weights to rounding."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import default_collate

import hessian
from hessian.batch import count_examples, map_tensors, take_examples, tensors_of
from hessian.diagnosis import explained_forward, explained_loss
from hessian.objective import LossFunction, LossNotFiniteError, Objective
from hessian.operators.curvature import CurvatureOperator
from hessian.processes import Processes
from hessian.task import Task
from hessian.torch_losses import is_classification
from parallel import curvature
from parallel.adversarial import attacked
from parallel.arrangement import arranged
from parallel.augmentation import Augmentation
from parallel.average import WeightAverage
from parallel.data_order import DataOrder, keyed_generator, share
from parallel.evaluation_mode import in_evaluation_mode
from parallel.noise_scale import NoiseScale, noise_scale
from parallel.optimizers import KFAC, OPTIMIZERS, AdaHessian
from parallel.optimizers.observed import ByOperator
from parallel.replica import checkpoint_activations
from parallel.step_batches import Part, StepBatches
from parallel.step_control import StepControl, by_layer
from parallel.step_curvature import step_hessian
from parallel.train_options import Config

PHASES = ("loading data", "running forward", "running backward", "estimating curvature")

_EVALUATION_BATCH = 256
_TRACE_PROBES = 32


class NotFiniteError(ArithmeticError):
    """The loss or its gradient is NaN or infinite in this step, on all ranks."""


@dataclass(frozen=True)
class Evaluation:
    """Means over the whole evaluation data."""

    metric: float
    loss: float


@dataclass(frozen=True)
class AttackedEvaluation:
    """Means over the evaluation data after an attack; perturbation: by which share of its norm an example's input moved."""

    metric: float
    perturbation: float


class Trainer:
    """A task's model, its optimizer and its place in the order of the data. Collective: all ranks do the same.

    `step` and `examples` count what has been done; `rate_scale` is what non-finite losses have left of the learning rate.
    Raises ValueError for a batch that cannot be shared, and for options that do not suit the task.
    """

    def __init__(self, task: Task, config: Config, processes: Processes) -> None:
        self.task, self.config, self.processes = task, config, processes
        self.size = len(task.train)  # type: ignore[arg-type]  # map-style datasets have a length
        self._check_batch()
        self.step = self.examples = 0
        self.rate_scale = 1.0
        self.augmentation = Augmentation(config.seed, config.mixup, config.flip, config.shift)
        self.loss = with_label_smoothing(task.loss, config.label_smoothing)
        model = task.model.to(processes.device).train()
        if config.checkpoint_activations and checkpoint_activations(model) == 0:
            raise ValueError(
                "--checkpoint-activations: the model has no blocks, in a Sequential or a ModuleList, to compute anew"
            )
        example = map_tensors(lambda tensor: tensor.to(processes.device), default_collate([task.train[0]]))[0]
        self.replica, self.groups, self.group_index = arranged(model, example, config, processes)
        self.batches = StepBatches(
            task.train,
            DataOrder(self.size, config.seed),
            self.augmentation,
            processes.device,
            group=self.group_index,
            groups=self.groups,
            workers=config.workers,
        )
        kind = OPTIMIZERS[config.optimizer]
        base_rate = kind.learning_rate if config.learning_rate is None else config.learning_rate
        trained = [(name, one) for name, one in self.replica.model.named_parameters() if one.requires_grad]
        if not trained:
            raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
        if kind.whole_layers and self.groups < processes.world_size:
            raise ValueError(f"--optimizer {config.optimizer} needs whole layers on each rank: leave out --mesh and --plan")
        in_parts = config.shard or self.groups < processes.world_size
        if config.adversarial_share or config.attack or config.adaptive_batch == "absa":
            self._check_attack(example, in_parts)
        self.optimizer = kind.make(self.replica.model, _groups(trained, config.layer_rates is not None), base_rate, config)
        self.control = StepControl(config, self.optimizer, dict(trained), base_rate, self.steps, self.size)
        self.average = None if config.ema is None else WeightAverage(self.replica.state(), config.ema)
        self.expected_weight = float(config.batch_size)  # of a step's batch, over all ranks: as much as in the step before
        self.expected_batch = config.batch_size  # of which the expected weight is
        self._weighing = Objective(self.replica.model, self.loss, [])  # counts what a batch's loss averages over

    @property
    def steps(self) -> int:
        """How many steps the whole run has, if the batch stays as it is."""
        if self.config.steps is not None:
            return self.config.steps
        epochs = 10.0 if self.config.epochs is None else self.config.epochs
        return math.ceil(epochs * self.size / self.config.batch_size)

    @property
    def done(self) -> bool:
        """Whether the examples of that many steps have been trained on."""
        return self.examples >= self.steps * self.config.batch_size

    def train(self) -> Iterator[dict[str, float]]:
        """Take the steps that are left; what each of them measured. NotFiniteError leaves the weights as they were."""
        size = 0
        loaded: Iterator[list[Part]] = iter(())
        while not self.done:
            try:
                self.control.update(self.step, self.examples, self)
            except (ArithmeticError, LossNotFiniteError) as error:
                raise NotFiniteError(f"{error} before step {self.step}") from error
            if self.control.batch_size != size:
                before, size = size or self.expected_batch, self.control.batch_size
                self.expected_weight *= size / before
                self.expected_batch = size
                loaded = self.batches.steps(self.step, self.examples, size, self.control.passes)
            self.processes.at(self.step, PHASES[0])
            yield self._step(next(loaded))

    def curvature(self) -> CurvatureOperator:
        """The Hessian of the loss of the examples that come next, as they are in the data set, of the model in its mode."""
        self._begin_measuring()
        return self._operator([self._next(0, max(self.config.curvature_examples, self.groups))])

    def noise_scale(self) -> NoiseScale:
        """Of the gradient, by the examples that come next."""
        self._begin_measuring()
        count = max(self.config.curvature_examples, self.groups)
        chunks = [self._next(number * count, count) for number in range(2)]
        return noise_scale(self.replica.measured_model, self.loss, chunks)

    def top_eigenvalue(self) -> float:
        """Of `curvature`."""
        own = keyed_generator("eigenvalue", self.config.seed, self.step)
        return float(hessian.top_eigenpairs(self.curvature(), tol=0.05, generator=own).values[0])

    def sharpness(self) -> dict[str, float]:
        """The top eigenvalue and the trace of `curvature`."""
        own = keyed_generator("sharpness", self.config.seed, self.step)
        operator = self.curvature()
        top = hessian.top_eigenpairs(operator, tol=0.05, generator=own)
        trace = hessian.trace(operator, method="hutchinson", max_matvecs=_TRACE_PROBES, generator=own)
        return {"top_eigenvalue": float(top.values[0]), "trace": trace.value, "trace_stderr": trace.stderr}

    def _begin_measuring(self) -> None:
        self.processes.at(self.step, PHASES[3])
        self._seed()  # dropout is the same on ranks that share examples

    def _next(self, skipped: int, count: int) -> Any:
        return self.batches.examples(self.examples + skipped, count)

    def _operator(self, batches: list[Any]) -> CurvatureOperator:
        operator = curvature.hessian(self.replica.measured_model, self.loss, batches, shard_vectors=False)
        assert isinstance(operator, CurvatureOperator)
        return operator

    def _step(self, parts: list[Part]) -> dict[str, float]:
        parts = [self._attacked(part) for part in parts]
        weights = [self._weighing.weight(self._own(part.batch)) for part in parts]
        self._seed()
        self.optimizer.zero_grad(set_to_none=True)
        expected = 1.0 if self._weighing.is_sum else self.expected_weight
        sums = torch.tensor([0.0, sum(weights)], dtype=torch.float64, device=self.processes.device)
        mixing = self.augmentation.share(self.step)
        for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            self.processes.at(self.step, PHASES[1])
            with self.replica.accumulating(number + 1 < len(parts)):
                self._weigh_pass(weight, expected, len(parts))
                part_of_loss = self._loss(self.replica, part, mixing, counts=weight > 0) * (weight / expected)
                self.processes.at(self.step, PHASES[2])
                (part_of_loss * self.replica.sum_gradients).backward()
            sums[0] += part_of_loss.detach()
        adding = distributed.all_reduce(sums, async_op=True)
        self.replica.finish_gradients()
        norm = self.replica.gradient_norm()
        adding.wait()
        value, total = sums.tolist()
        if not self._weighing.is_sum and total != expected:  # the batch counts otherwise than the one before
            self.expected_weight = total or expected
            correction = expected / self.expected_weight
            self.replica.scale_gradient(correction)
            norm, value = norm * correction, value * correction
        length = float(norm)
        if not math.isfinite(value) or not math.isfinite(length):
            raise NotFiniteError(f"the loss is {value} and its gradient's norm {length} in step {self.step}")
        if self.config.clip is not None:
            self.replica.shorten_gradient(norm, self.config.clip)
        if isinstance(self.optimizer, AdaHessian | ByOperator) and self.optimizer.needs_curvature():
            self._observe(self.optimizer, list(zip(parts, weights, strict=True)), mixing)
        learning_rate = self.control.set_rates(self.examples, self.rate_scale)
        self.optimizer.step()
        self.step += 1
        self.examples += self.control.batch_size
        if self.average is not None:
            self.average.update(self.step)
        row = {
            "step": self.step,
            "examples": self.examples,
            "loss": value,
            "learning_rate": learning_rate,
            "batch_size": self.control.batch_size,
            "gradient_norm": length,
        }
        every = self.config.sharpness_every
        if every is not None and self.step % every == 0:
            row |= self.sharpness()
        return row

    def _attacked(self, part: Part) -> Part:
        """The part, with the share of its examples that is to be adversarial moved against the loss; the same examples on any
        number of ranks."""
        share = self.control.adversarial_share
        if not share:
            return part
        inputs, targets = part.batch
        positions = torch.arange(part.first, part.first + len(inputs))
        chosen = ((positions + 1) * share).floor() > (positions * share).floor()
        if not chosen.any():
            return part
        rows = chosen.nonzero().squeeze(1).to(inputs.device)
        changed = inputs.clone()
        changed[rows] = self._moved(self.loss, inputs[rows], targets[rows])
        return replace(part, batch=[changed, targets])

    def _moved(self, loss: LossFunction, inputs: Any, targets: Any) -> torch.Tensor:
        config = self.config
        return attacked(
            config.attack or "fgsm", self.replica.measured_model, loss, inputs, targets, config.epsilon, config.seed
        )

    def _weigh_pass(self, weight: float, expected: float, passes: int) -> None:
        """Tell an optimizer that reads gradients in the passes what their loss is to the items' losses."""
        if isinstance(self.optimizer, KFAC):
            shares = passes * self.groups  # a sum of all items' losses is one item, of which each pass has a share
            items = weight / shares if self._weighing.is_sum else weight
            self.optimizer.weigh(items, expected / self.replica.sum_gradients)

    def _observe(self, optimizer: AdaHessian | ByOperator, parts: list[tuple[Part, float]], mixing: float) -> None:
        """Show the optimizer the Hessian of the step's loss, or of its first passes; `parts` have their weights."""
        chosen = parts[: self.config.curvature_passes]
        total = torch.tensor(sum(weight for _, weight in chosen), dtype=torch.float64, device=self.processes.device)
        distributed.all_reduce(total)
        whole = len(chosen) / len(parts) if self._weighing.is_sum else float(total) or 1.0

        def loss(model: nn.Module, part: tuple[Part, float]) -> torch.Tensor:
            return self._loss(model, part[0], mixing, counts=part[1] > 0) * (part[1] / whole)

        self.processes.at(self.step, PHASES[3])
        self._seed()  # the same dropout
        try:
            operator = step_hessian(self.replica.curvature_model(), loss, chosen)
            optimizer.observe(operator, keyed_generator("curvature", self.config.seed, self.step))
        except ArithmeticError as error:
            raise NotFiniteError(f"{error} in step {self.step}") from error

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """The metric and the loss of the evaluation data, which the ranks share."""
        objective = Objective(self.replica.model, self.task.loss, [])
        sums = torch.zeros(4, dtype=torch.float64)
        with self._averaged(), in_evaluation_mode(self.replica.model), self._autocast():
            for batch, is_own in self._evaluation_batches():
                with explained_forward(self.replica.model, batch[0], " of the evaluation data"):
                    outputs = self.replica.outputs(batch[0])
                own = self._own(batch)
                examples = count_examples(own)
                if is_own and examples:
                    weight = objective.weight(own)
                    loss = float(explained_loss(self.task.loss, outputs, own[1], " of the evaluation data"))
                    metric = float(self.task.metric(outputs, own[1]))
                    sums += torch.tensor([weight * loss, weight, examples * metric, examples], dtype=torch.float64)
        sums = sums.to(self.processes.device)
        distributed.all_reduce(sums)
        loss, weight, metric, examples = sums.tolist()
        return Evaluation(metric / examples, loss if objective.is_sum else loss / weight if weight else math.nan)

    def evaluate_attacked(self) -> AttackedEvaluation:
        """The metric of the evaluation data as the config's attack moves it."""
        sums = torch.zeros(3, dtype=torch.float64)
        with self._averaged(), in_evaluation_mode(self.replica.model):
            for (inputs, targets), is_own in self._evaluation_batches():
                if is_own:
                    moved = self._moved(self.task.loss, inputs, targets)
                    with torch.no_grad():
                        metric = float(self.task.metric(self.replica.model(moved), targets))
                    shares = (moved - inputs).flatten(1).norm(dim=1) / inputs.flatten(1).norm(dim=1).clamp(min=1e-30)
                    sums += torch.tensor([len(inputs) * metric, float(shares.sum()), len(inputs)], dtype=torch.float64)
        sums = sums.to(self.processes.device)
        distributed.all_reduce(sums)
        metric, perturbation, examples = sums.tolist()
        return AttackedEvaluation(metric / examples, perturbation / examples)

    def _evaluation_batches(self) -> Iterator[tuple[Any, bool]]:
        """Batches of this rank's share, as many as on every other, and whether it is: a rank without any keeps step."""
        dataset = self.task.evaluation
        size = len(dataset)  # type: ignore[arg-type]  # map-style datasets have a length
        start, stop = share(0, size, self.group_index, self.groups)
        for number in range(math.ceil(math.ceil(size / self.groups) / _EVALUATION_BATCH)):
            first = start + number * _EVALUATION_BATCH
            chosen = range(first, min(first + _EVALUATION_BATCH, stop)) or range(1)
            items = default_collate([dataset[index] for index in chosen])
            yield map_tensors(lambda tensor: tensor.to(self.processes.device), items), first < stop

    def _seed(self) -> None:
        """Random numbers of this step, the same for ranks that share examples."""
        seed = keyed_generator("step", self.config.seed, self.step, self.group_index).initial_seed()
        torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every kind of device, which takes half a millisecond
        if self.processes.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _own(self, batch: Any) -> Any:
        """Of a batch that this rank passes, the examples that its outputs are of."""
        return take_examples(batch, slice(*self.replica.own_examples(count_examples(batch))))

    def _check_attack(self, inputs: Any, in_parts: bool) -> None:
        """Now, and not when the training is done."""
        if in_parts:
            raise ValueError("adversarial examples need the whole model on each rank: leave out --shard, --mesh and --plan")
        if not isinstance(inputs, torch.Tensor) or not inputs.is_floating_point():
            kind = inputs.dtype if isinstance(inputs, torch.Tensor) else f"a {type(inputs).__name__}"
            raise ValueError(f"the inputs are {kind}, and attacks move floating-point tensors: leave out --attack and the like")
        targets = default_collate([self.task.train[0][1]])
        if self.config.attack == "trust-region" and (targets.dim() != 1 or targets.is_floating_point()):
            raise ValueError(
                "--attack trust-region moves examples to other classes, and targets are no classes: take fgsm or pgd"
            )

    def _check_batch(self) -> None:
        size, ranks = self.config.batch_size, self.processes.world_size
        if size // self.config.accumulate < ranks:
            passes = f" in {self.config.accumulate} passes" if self.config.accumulate > 1 else ""
            raise ValueError(f"--batch-size {size}{passes} is fewer examples than the {ranks} ranks that share it")
        if size > self.size:
            raise ValueError(f"--batch-size {size}: the training data has {self.size} examples")
        if self.config.curvature_examples > max(self.size, Config.curvature_examples):
            raise ValueError(
                f"--curvature-examples {self.config.curvature_examples}: the training data has {self.size} examples"
            )

    def _loss(self, model: Callable[[Any], Any], part: Part, mixing: float, *, counts: bool) -> torch.Tensor:
        """The loss of this rank's examples by `model`; 0 where none `counts`, of which a mean is not defined."""
        inputs, targets = part.batch[0], self._own(part.batch)[1]
        if part.partners is not None:
            if not all(tensor.is_floating_point() for tensor in tensors_of(inputs)):
                raise ValueError("--mixup mixes inputs, and these are no floating-point numbers: leave it out")
            inputs = map_tensors(lambda tensor: mixing * tensor, inputs)
            inputs = inputs + map_tensors(lambda tensor: (1 - mixing) * tensor, part.partners[0])
        with self._autocast():
            with explained_forward(self.replica.model, inputs):
                outputs = model(inputs)
            if not counts:
                return sum(tensor.sum() for tensor in tensors_of(outputs)) * torch.zeros(())
            loss = explained_loss(self.loss, outputs, targets)
            if part.partners is not None:
                loss = mixing * loss + (1 - mixing) * explained_loss(self.loss, outputs, self._own(part.partners)[1])
        return loss

    def _autocast(self) -> Any:
        return torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.average is None else self.average.in_place()


def _groups(parameters: list[tuple[str, nn.Parameter]], layerwise: bool) -> list[dict[str, Any]]:
    """Parameter groups of whole and of divided tensors, which torch's optimizers cannot update together; one a layer if rates
    are `layerwise`."""
    found: list[dict[str, Any]] = []
    named = dict(parameters)
    layers = by_layer(list(named)) if layerwise else {"": list(named)}
    for layer, names in layers.items():
        for divided in (False, True):
            kind = [(name, named[name]) for name in names if isinstance(named[name], DTensor) == divided]
            if kind:
                found.append({"params": kind} | ({"layer": layer} if layerwise else {}))
    return found


def with_label_smoothing(loss: LossFunction, smoothing: float) -> LossFunction:
    """Cross-entropy with label smoothing (Szegedy et al., 2016); ValueError for another loss, unless `smoothing` is 0."""
    if smoothing == 0:
        return loss
    if isinstance(loss, nn.CrossEntropyLoss):
        smooth = copy.copy(loss)
        smooth.label_smoothing = smoothing
        return smooth
    function = loss.func if isinstance(loss, partial) else loss
    if is_classification(loss) and function is F.cross_entropy:
        return partial(loss, label_smoothing=smoothing)  # type: ignore[call-arg]  # cross-entropy takes it
    raise ValueError(f"--label-smoothing {smoothing}: the task's loss is not torch's cross-entropy")
