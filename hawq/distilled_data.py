r"""Calibration data out of batch-norm statistics, where there is no data (ZeroQ, Cai et al. 2020, section 3.1).

Batch norms remember the mean and the variance of what they read in training. Inputs x that make a trained network's
batch norms read the same are drawn to minimise

.. math:: D(x) = \frac{1}{L + 1} \sum_{l=0}^{L} \frac{1}{C_l} \sum_c
    \frac{(m_{lc}(x) - \mu_{lc})^2}{\sigma_{lc}^2 + \epsilon}
    + \Big(\sqrt{\frac{v_{lc}(x) + \epsilon}{\sigma_{lc}^2 + \epsilon}} - 1\Big)^2

with m, v the batch's mean and variance, :math:`\mu, \sigma^2` the stored ones and l = 0 the input's own prior: the squared
Wasserstein distance between two Gaussians in units of the norm's output. ZeroQ's (3) sums it in units of the norm's
input, where layers and channels count as much as their weights happen to be large, though the norm divides that out.
"""

import copy
import math
import warnings
from collections.abc import Callable

import torch
from torch import fx, nn
from tqdm.auto import tqdm

from hawq.graph import argument, trace
from hawq.pseudo_targets import pseudo_targets, require_known
from hessian.objective import LossFunction
from hessian.torch_losses import is_classification

aten = torch.ops.aten

Batches = list[tuple[torch.Tensor, torch.Tensor]]

_STORED = aten._native_batch_norm_legit_no_training.default
# Normalise by the batch's own statistics, so that no stored ones say what they read in training.
_NOT_STORED = frozenset((aten._native_batch_norm_legit.no_stats, aten._native_batch_norm_legit_functional.default))

# Of the classes' term in `distilled_data`. Hessian traces on distilled inputs are 125 and 65 times those on real data
# without the term, and 0.6 and 0.8 times with it (digits-resnet20 and digits-mobilenet, geometric means over layers).
_CLASS_WEIGHT = 0.05


@torch.inference_mode(False)
@torch.enable_grad()
def distilled_data(
    model: nn.Module,
    example: torch.Tensor,
    *,
    size: int = 64,
    batch_size: int = 64,
    steps: int = 100,
    learning_rate: float = 0.1,
    input_mean: float | torch.Tensor = 0.0,
    input_std: float | torch.Tensor = 1.0,
    input_range: tuple[float, float] | None = None,
    class_scores: bool = False,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> torch.Tensor:
    r"""Inputs (size, \*example.shape[1:]) whose statistics in every batch norm are the stored ones: a minimum of D above.

    example: a float32 input with a leading batch dimension; its shape and device are used, its values are not.
    batch_size: inputs that are optimised, and measured, together; `size` is cut into equal batches of at most so many.
    steps, learning_rate: of Adam on each batch, which starts from noise; the rate decays to 0 by a cosine (in units of
    `input_std`). input_mean, input_std: the prior of the input, scalars or one value for each channel (dimension 1).
    input_range: values that inputs cannot leave. class_scores: the outputs (N, C, ...) are scores of C classes; then
    inputs are made confident and their classes spread, by 0.05 (mean entropy - entropy of the mean) / log C of the
    softmax added to D. Widths hardly depend on it, but the size of curvature does: a Hessian's trace is p (1 - p).

    The graph of operations is read, not the modules: any batch norm in evaluation mode counts, whatever it follows. One
    that is run more than once is compared on average over its runs, as its statistics were. The model is not changed.

    Raises ValueError for a network without stored statistics, statistics that are not finite, inputs that are not
    float32, fewer than two inputs in a batch, and as `hawq.graph.trace`. Warns of batch norms that have none stored.
    """
    _check(example, size, batch_size, steps, input_std, input_range)
    graph = trace(model, example)
    graph.requires_grad_(False)
    _require_norms(graph)
    mean, std = (_per_input_channel(value, example) for value in (input_mean, input_std))
    start = torch.randn(size, *example.shape[1:], generator=generator).to(example.device) * std + mean
    batches = start.tensor_split(math.ceil(size / batch_size))
    if min(len(batch) for batch in batches) < 2:
        raise ValueError(f"size={size} in batches of {batch_size} leaves an input alone, without variance: raise batch_size")
    distilled = []
    with tqdm(desc="distillation", total=steps * len(batches), unit="step", disable=not progress) as bar:
        for batch in batches:
            inputs = batch.clone().requires_grad_(True)
            optimizer = torch.optim.Adam([inputs], learning_rate * float(std.mean()))
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            for _ in range(steps):
                if input_range is not None:
                    inputs.data.clamp_(*input_range)
                reader = _Reader(graph)
                outputs = reader.run(inputs.clone())  # a network may write into its input
                prior = _distance(*_statistics(inputs), mean.flatten(), std.flatten().square(), 0.0)
                objective = torch.stack([prior, *reader.distances().values()]).mean()
                if class_scores:
                    objective = objective + _CLASS_WEIGHT * _class_uncertainty(outputs)
                optimizer.zero_grad()
                objective.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            distilled.append(inputs.detach())
    result = torch.cat(distilled)
    return result if input_range is None else result.clamp(*input_range)


def distilled_batches(
    model: nn.Module,
    loss: LossFunction,
    example: torch.Tensor,
    *,
    size: int = 64,
    batch_size: int = 64,
    steps: int = 100,
    input_mean: float | torch.Tensor = 0.0,
    input_std: float | torch.Tensor = 1.0,
    input_range: tuple[float, float] | None = None,
    targets: Callable[[torch.Tensor], torch.Tensor] | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Batches:
    """Batches of (inputs, targets) for sensitivities, roundings and calibration: `distilled_data` and `pseudo_targets`.

    targets: makes them from the model's outputs, where `pseudo_targets` does not know the loss.
    """
    if targets is None:
        require_known(loss)  # before the work
    inputs = distilled_data(
        model,
        example,
        size=size,
        batch_size=batch_size,
        steps=steps,
        input_mean=input_mean,
        input_std=input_std,
        input_range=input_range,
        class_scores=is_classification(loss),
        generator=generator,
        progress=progress,
    )
    frozen = copy.deepcopy(model).eval()
    batches = []
    for batch in inputs.tensor_split(math.ceil(size / batch_size)):
        with torch.no_grad():
            outputs = frozen(batch.clone())
        batches.append((batch, pseudo_targets(loss, outputs, generator=generator) if targets is None else targets(outputs)))
    return batches


def batch_norm_distances(model: nn.Module, inputs: torch.Tensor) -> dict[str, float]:
    """How far each batch norm's statistics on `inputs` are from the stored ones: the mean over channels in D, by norm.

    0: equal; 1: off by the stored standard deviation; N independent values a channel of the training data: some 1.5 / N.
    Raises as `distilled_data`.
    """
    graph = trace(model, inputs)
    _require_norms(graph)
    with torch.no_grad():
        reader = _Reader(graph)
        reader.run(inputs.clone())
        return {name: float(distance) for name, distance in reader.distances().items()}


class _Reader(fx.Interpreter):
    """Runs a graph and takes the statistics of what its batch norms read, by the name of the stored ones."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.read: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.stored: dict[str, tuple[torch.Tensor, torch.Tensor, float]] = {}

    def run_node(self, n: fx.Node) -> object:
        if n.target is _STORED:
            x, _, _, mean, variance, _, eps = self.fetch_args_kwargs_from_env(n)[0]
            name = _name(n)
            self.read.setdefault(name, []).append(_statistics(x))
            self.stored[name] = (mean.detach(), variance.detach(), eps)
        return super().run_node(n)

    def distances(self) -> dict[str, torch.Tensor]:
        """The mean over channels in D, by norm; ValueError where one is not finite."""
        result = {}
        for name, runs in self.read.items():
            mean, variance = (torch.stack(parts).mean(0) for parts in zip(*runs))
            result[name] = _distance(mean, variance, *self.stored[name])
            if not torch.isfinite(result[name]):
                for what, stored in zip(("mean", "variance"), self.stored[name][:2]):
                    if not (torch.isfinite(stored).all() and (what == "mean" or (stored >= 0).all())):
                        raise ValueError(
                            f"the stored {what} of batch norm {name!r} holds NaN, Inf or less than 0: "
                            "the checkpoint is damaged, or its training diverged"
                        )
                raise ValueError(f"what batch norm {name!r} reads is NaN or Inf: weights before it are, or overflow")
        return result


def _statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each channel, as batch norms store them."""
    dims = [dim for dim in range(x.dim()) if dim != 1]
    return x.mean(dims), x.var(dims)


def _distance(
    mean: torch.Tensor, variance: torch.Tensor, stored_mean: torch.Tensor, stored_variance: torch.Tensor, eps: float
) -> torch.Tensor:
    scale = stored_variance + eps
    tiny = torch.finfo(variance.dtype).tiny  # a root has no gradient at 0
    spread = ((variance + eps).clamp_min(tiny) / scale).sqrt() - 1
    return ((mean - stored_mean).square() / scale + spread.square()).mean()


def _class_uncertainty(outputs: object) -> torch.Tensor:
    """(mean entropy - entropy of the mean) / log C, between -1 (each input sure, classes equally frequent) and 0."""
    if not isinstance(outputs, torch.Tensor) or outputs.dim() < 2 or outputs.shape[1] < 2:
        shape = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise ValueError(f"the outputs are {shape}, not scores (N, C, ...) of two classes or more: pass class_scores=False")
    log_p = outputs.log_softmax(1).movedim(1, -1).flatten(0, -2)
    mean_log_p = log_p.logsumexp(0) - math.log(len(log_p))
    entropy = -(log_p.exp() * log_p).sum(1).mean()
    return (entropy + (mean_log_p.exp() * mean_log_p).sum()) / math.log(outputs.shape[1])


def _name(norm: fx.Node) -> str:
    """The module or, of a functional batch norm, the buffer that holds a norm's mean."""
    mean = argument(norm, 3)
    return str(mean.target).removesuffix(".running_mean") if mean is not None and mean.op == "get_attr" else norm.name


def _require_norms(graph: fx.GraphModule) -> None:
    targets = [node.target for node in graph.graph.nodes]
    skipped = [node.name for node in graph.graph.nodes if node.target in _NOT_STORED]
    if _STORED not in targets:
        raise ValueError(
            "no batch norm of the model has stored statistics"
            + (" (track_running_stats=False)" if skipped else "")
            + ", from which data could be distilled: give calibration data"
        )
    if skipped:
        warnings.warn(
            f"{len(skipped)} batch norms normalise by the batch at hand ({', '.join(skipped)}): distilled data do not "
            "follow them, for they have no statistics of the training data",
            stacklevel=3,
        )


def _per_input_channel(value: float | torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """Shaped to broadcast over inputs; ValueError unless it is one value, or one for each channel."""
    channels = example.shape[1]
    given = torch.as_tensor(value, dtype=example.dtype, device=example.device).flatten()
    if len(given) not in (1, channels):
        raise ValueError(f"{len(given)} values of input_mean or input_std: the input has {channels} channels")
    return given.expand(channels).view(1, channels, *(1,) * (example.dim() - 2))


def _check(
    example: torch.Tensor,
    size: int,
    batch_size: int,
    steps: int,
    input_std: float | torch.Tensor,
    input_range: tuple[float, float] | None,
) -> None:
    if not isinstance(example, torch.Tensor) or example.dim() < 2:
        raise TypeError("the example is not one tensor (batch, channels, ...): its shape is that of the data to distil")
    if example.dtype != torch.float32:
        raise ValueError(f"inputs of {example.dtype} cannot be distilled by gradients, only float32: give calibration data")
    if min(size, batch_size) < 2:
        raise ValueError(f"size={size}, batch_size={batch_size}: statistics need two inputs or more")
    if steps < 1:
        raise ValueError(f"steps={steps}: give 1 or more")
    if not bool((torch.as_tensor(input_std) > 0).all()):
        raise ValueError(f"input_std={input_std}: give standard deviations above 0")
    if input_range is not None and not input_range[0] < input_range[1]:
        raise ValueError(f"input_range={input_range}: give (low, high), low < high")
