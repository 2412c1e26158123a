r"""The curvature of the loss in a network's activations, module by module.

Adding a perturbation d to a module's output makes the activations parameters: the loss's Hessian in d, at d = 0, is the Hessian
in the activations. For a loss that is a mean over examples its trace is the mean of the examples' own traces,

.. math:: \mathrm{tr}\, \nabla_d^2 L = \frac1N \sum_n \mathrm{tr} \frac{\partial^2 \ell_n}{\partial a_n^2},

as HAWQ-V2 needs them to choose the activations' bits (Dong et al., 2020, section 3.4).
"""

import contextlib
import difflib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge
from tqdm.auto import tqdm

from hessian.batch import count_examples
from hessian.draws import ExampleDraws
from hessian.estimators.exact_trace import MAX_OUTPUTS
from hessian.estimators.example_rows import mixing_nodes
from hessian.estimators.sampling import standard_error
from hessian.objective import Data, LossFunction, Objective
from hessian.operators.curvature import as_objective, differentiable_twice
from hessian.output_curvature import OutputCurvatureError, output_curvature_factors
from hessian.output_loss import loss_in_double
from hessian.progress import up_to
from hessian.results import LayerReport, LayerRow
from hessian.second_backward import CheapSecondBackward
from hessian.structure import certify

_MIN_PROBES = 32
_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)


def activation_report(
    model: nn.Module | Objective,
    loss: LossFunction | None = None,
    data: Data | None = None,
    modules: str | Sequence[str] | None = None,
    *,
    rtol: float = 0.05,
    max_probes: int = 128,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> LayerReport:
    """Traces of the Hessian in modules' outputs, by module name; `num_params` counts activations of one example.

    `modules`: names or globs; by default all linear and convolutional ones. A trace is exact where the outputs are piecewise
    linear in the activation, from one backward pass an output; elsewhere it is sampled by Rademacher probes until its standard
    error is at most `rtol` times it, or `max_probes` are spent. A module that is called several times counts as a whole.

    ValueError for a glob that matches nothing and a module whose output is not one floating-point tensor.
    """
    objective = as_objective(model, loss, data)
    chosen = _select(objective.model, modules)
    parts = objective.gathered(lambda: _own_traces(objective, chosen, progress))
    reasons = {name: reason for part in parts for name, reason in part.reasons.items()}
    sizes = {name: max(part.sizes[name] for part in parts) for name in chosen}
    rows = {
        name: LayerRow(sum(part.traces[name] for part in parts), 0.0, True, sizes[name])
        for name in chosen
        if name not in reasons
    }
    spent = 0
    if reasons:
        sampled = {name: chosen[name] for name in chosen if name in reasons}
        samples = _sample(objective, sampled, rtol, max_probes, generator, progress)
        for name, values in samples.items():
            stderr, trace = standard_error(values), float(values.mean())
            rows[name] = LayerRow(trace, stderr, False, sizes[name], stderr <= rtol * abs(trace), reasons[name])
            spent = len(values)
    return LayerReport({name: rows[name] for name in chosen}, spent)


@dataclass(frozen=True)
class _Traces:
    """Exact traces, the reasons for modules that have none, and activations of one example; 0 where there is no example."""

    traces: dict[str, float]
    reasons: dict[str, str]
    sizes: dict[str, int]


def _own_traces(objective: Objective, chosen: Mapping[str, nn.Module], progress: bool) -> _Traces:
    """The part of this process's data."""
    found = _Traces(dict.fromkeys(chosen, 0.0), {}, dict.fromkeys(chosen, 0))
    with objective.undisturbed():
        for batch, weight in tqdm(objective.own_batches(), desc="activations", unit="batch", disable=not progress):
            with _perturbed(chosen) as perturbations:
                outputs = objective.outputs(batch)
            traces, reasons = _exact(objective, batch, outputs, perturbations)
            for name, trace in traces.items():
                found.traces[name] += weight * trace
            found.reasons.update(reasons)
            for name, tensors in perturbations.items():
                found.sizes[name] = sum(tensor.numel() for tensor in tensors) // count_examples(batch)
    return found


def _select(model: nn.Module, patterns: str | Sequence[str] | None) -> dict[str, nn.Module]:
    named = {name: module for name, module in model.named_modules() if name}
    if patterns is None:
        chosen = {name for name, module in named.items() if isinstance(module, _WEIGHTED)}
        if not chosen:
            raise ValueError("the model has no linear or convolutional module: name the modules whose outputs are meant")
        return {name: named[name] for name in named if name in chosen}
    chosen = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = set(fnmatch.filter(named, pattern))
        if not matches:
            near = difflib.get_close_matches(pattern, named, n=3, cutoff=0.3) or list(named)[:3]
            raise ValueError(f"no module matches {pattern!r}; the nearest names are {', '.join(near)}")
        chosen |= matches
    return {name: named[name] for name in named if name in chosen}


@contextlib.contextmanager
def _perturbed(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Add a zero perturbation to every output of the modules while inside; the perturbations, by module name."""
    perturbations: dict[str, list[torch.Tensor]] = {name: [] for name in modules}

    def hook(name: str, output: Any) -> torch.Tensor:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            raise ValueError(
                f"the output of module {name!r} is a {type(output).__name__}: choose modules that return one tensor"
            )
        perturbations[name].append(torch.zeros_like(output).requires_grad_(True))
        return output + perturbations[name][-1]

    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: hook(name, output))
        for name, module in modules.items()
    ]
    try:
        yield perturbations
    finally:
        for handle in handles:
            handle.remove()


def _exact(
    objective: Objective, batch: Any, outputs: Any, perturbations: Mapping[str, list[torch.Tensor]]
) -> tuple[dict[str, float], dict[str, str]]:
    """Traces for one batch, and the reasons for modules that have no exact one."""
    if not isinstance(outputs, torch.Tensor) or outputs.dim() < 1 or outputs[0].numel() > MAX_OUTPUTS:
        return {}, dict.fromkeys(perturbations, f"the outputs are not one tensor with at most {MAX_OUTPUTS} numbers an example")
    (leaf,), loss = loss_in_double(objective, outputs, batch)
    try:
        cotangents, signs = output_curvature_factors(leaf, loss, outputs)
    except OutputCurvatureError as error:
        return {}, dict.fromkeys(perturbations, str(error))
    flat = {f"{name} {number}": tensor for name, tensors in perturbations.items() for number, tensor in enumerate(tensors)}
    certificates = certify(outputs, flat)  # type: ignore[arg-type]  # leaves of a graph, like parameters
    reasons = {
        key.rsplit(" ", 1)[0]: certificate.reason
        for key, certificate in certificates.items()
        if not certificate.absent and (certificate.use is None or certificate.reason)
    }
    adding = {key: certificate.use.node for key, certificate in certificates.items() if certificate.use is not None}
    mixing = mixing_nodes(outputs, [GradientEdge(node, 0) for node in adding.values()])
    reasons |= {key.rsplit(" ", 1)[0]: mixing[node] for key, node in adding.items() if node in mixing}
    kept = {name: tensors for name, tensors in perturbations.items() if name not in reasons and tensors}
    traces = {name: 0.0 for name in perturbations if name not in reasons}
    leaves = [tensor for tensors in kept.values() for tensor in tensors]
    owners = [name for name, tensors in kept.items() for _ in tensors]
    for cotangent, sign in zip(cotangents, signs, strict=True) if leaves else ():
        gradients = torch.autograd.grad(
            outputs, leaves, grad_outputs=cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for name, gradient in zip(owners, gradients, strict=True):
            squares = gradient.double().square().unflatten(0, (len(sign), -1)).flatten(1).sum(1)
            traces[name] += float((squares * sign).sum())
    return traces, reasons


def _sample(
    objective: Objective,
    modules: Mapping[str, nn.Module],
    rtol: float,
    max_probes: int,
    generator: torch.Generator | None,
    progress: bool,
) -> dict[str, torch.Tensor]:
    """z . (H z) of every module's activations for each probe, looked at after 32, 64, ... probes."""
    samples: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    count, look = 0, min(_MIN_PROBES, max_probes)
    with up_to(max_probes, "probes", "probe", progress=progress) as bar:
        while True:
            number, seed = look - count, objective.seed(generator)
            parts = objective.gathered(lambda: _own_probes(objective, modules, number, seed))  # noqa: B023  # called at once
            for name in modules:
                samples[name].append(torch.stack([part[name] for part in parts]).sum(0))
            bar.update(look - count)
            count = look
            joined = {name: torch.cat(values) for name, values in samples.items()}
            settled = all(standard_error(values) <= rtol * abs(float(values.mean())) for values in joined.values())
            if settled or count >= max_probes:
                return joined
            look = min(2 * look, max_probes)


def _own_probes(objective: Objective, modules: Mapping[str, nn.Module], count: int, seed: int) -> dict[str, torch.Tensor]:
    """This process's part of `count` samples of every module, one pass over its data."""
    totals = {name: torch.zeros(count, dtype=torch.float64) for name in modules}
    with objective.undisturbed(), CheapSecondBackward():
        for batch, weight in objective.own_batches():
            draws = ExampleDraws(batch, seed)
            with _perturbed(modules) as perturbations:
                loss = objective.batch_loss(objective.outputs(batch), batch)
            leaves = [tensor for tensors in perturbations.values() for tensor in tensors]
            owners = [name for name, tensors in perturbations.items() for _ in tensors]
            gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
            differentiable_twice(gradients)
            curved = [index for index, gradient in enumerate(gradients) if gradient.requires_grad]
            for number in range(count if curved else 0):
                probes = [draws.signs(leaf.shape).to(leaf) for leaf in leaves]
                products = torch.autograd.grad(
                    [gradients[index] for index in curved],
                    leaves,
                    grad_outputs=[probes[index] for index in curved],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                for name, probe, product in zip(owners, probes, products, strict=True):
                    totals[name][number] += weight * float((probe * product).sum(dtype=torch.float64))
    return totals
