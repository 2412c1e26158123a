r"""The second-order term of the loss in the actual rounding error, instead of its expectation over directions.

.. math:: \Omega_i(b) = d^\top H_i\, d, \qquad d = Q_b(W_i) - W_i

Half of it is the increase of the loss that the quadratic model predicts for rounding layer i alone. The layer's output a
changes by delta, which is linear in d. With :math:`\sum_c s_c u_c u_c^\top` the loss's second derivative in the outputs f,
where these are piecewise linear in a,

.. math:: d^\top H_i\, d = \sum_{n, c} s_{nc}
          \Big\langle \frac{\partial (u_{nc} \cdot f_n)}{\partial a_n}, \delta_n \Big\rangle^2 :

one backward pass an output serves all layers and widths, and each of these costs one forward pass of its own layer. Elsewhere
it is delta times the Hessian in the layer's outputs times delta, one second backward pass for each layer and width.

Without the network's own curvature, H becomes the Gauss-Newton matrix G, the sum above is d.G d for every network whose
examples do not mix, and of a cross-entropy half of it is KL(float || quantized) to second order. Of many outputs, one random u
a example with E[u u^T] = sum_c s_c u_c u_c^T, for a cross-entropy the gradient at a label drawn from the network's own
distribution, takes the place of the sum.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import fx
from torch.autograd.graph import GradientEdge
from tqdm.auto import tqdm

from hawq.graph import Layer, input_node
from hawq.sensitivity.rounded import RoundingErrors
from hawq.sensitivity.subset import first_examples
from hawq.sensitivity.table import SensitivityTable
from hessian.batch import count_examples
from hessian.draws import ExampleDraws
from hessian.estimators.exact_trace import MAX_OUTPUTS
from hessian.estimators.example_rows import mixing_nodes
from hessian.objective import Objective
from hessian.operators.curvature import differentiable_twice
from hessian.output_curvature import OutputCurvatureError, output_cotangents, output_curvature_factors
from hessian.output_loss import loss_in_double
from hessian.structure import certify

Terms = dict[str, dict[int, float]]

_DRAWN_EXAMPLES, _DRAWN_BATCH = 128, 16
_NOTED = 0.1  # of the second-order terms: from here on the reader is told of first-order ones


class _Perturbed(fx.Interpreter):
    """Runs a graph with a zero added to the output of every layer; keeps these zeros and the layers' inputs."""

    def __init__(self, graph: fx.GraphModule, layers: Mapping[str, Layer]) -> None:
        super().__init__(graph)
        self.names = {layer.node.name: name for name, layer in layers.items()}
        self.zeros: dict[str, torch.Tensor] = {}
        self.inputs: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name not in self.names:
            return result
        name = self.names[n.name]
        self.inputs[name] = self.env[input_node(n)].detach()
        self.zeros[name] = torch.zeros_like(result).requires_grad_(True)
        return result + self.zeros[name]


def loss_terms(
    objective: Objective,
    layers: Mapping[str, Layer],
    errors: RoundingErrors,
    *,
    matrix: Literal["hessian", "gauss-newton"] = "hessian",
    progress: bool = False,
) -> tuple[Terms, Terms]:
    """g.d and d.H d, or d.G d where that can be read off, of every layer and width over the data set, in the loss's units; no
    sampling error."""
    first: Terms = {name: dict.fromkeys(row, 0.0) for name, row in errors.items()}
    second: Terms = {name: dict.fromkeys(row, 0.0) for name, row in errors.items()}
    for own in objective.gathered(lambda: _own_loss_terms(objective, layers, errors, matrix, progress)):
        for total, part in zip((first, second), own, strict=True):
            for name, row in part.items():
                for bits, value in row.items():
                    total[name][bits] += value
    return first, second


def _own_loss_terms(
    objective: Objective,
    layers: Mapping[str, Layer],
    errors: RoundingErrors,
    matrix: Literal["hessian", "gauss-newton"],
    progress: bool,
) -> tuple[Terms, Terms]:
    """The part of this process's data."""
    first: Terms = {name: dict.fromkeys(row, 0.0) for name, row in errors.items()}
    second: Terms = {name: dict.fromkeys(row, 0.0) for name, row in errors.items()}
    graph = objective.model
    assert isinstance(graph, fx.GraphModule)
    with objective.undisturbed():
        for batch, weight in tqdm(objective.own_batches(), desc="second order", unit="batch", disable=not progress):
            run = _Perturbed(graph, layers)
            outputs = run.run(batch[0])
            with torch.no_grad():
                changes = {
                    name: torch.stack([error.of_output(layers[name], run.inputs[name]) for error in row.values()])
                    for name, row in errors.items()
                }
            found, curved = _from_outputs(objective, batch, outputs, run.zeros, changes, whole=matrix == "hessian")
            slopes = _slopes(objective.batch_loss(outputs, batch), run.zeros, create_graph=bool(curved))
            found |= _second_backward({name: slopes[name] for name in curved}, run.zeros, changes)
            for name, row in errors.items():
                along = changes[name].flatten(1) @ slopes[name].detach().flatten()
                for bits, slope, curvature in zip(row, along.tolist(), found[name].tolist(), strict=True):
                    first[name][bits] += weight * slope
                    second[name][bits] += weight * curvature
    return first, second


def second_order(
    objective: Objective, layers: Mapping[str, Layer], errors: RoundingErrors, *, progress: bool = False
) -> SensitivityTable:
    """The table of d.H d, which is exact for the data given. Negative curvature along d counts as none.

    The first-order terms are left out, as at a minimum; `note` tells where they are not small.
    """
    return _table(*loss_terms(objective, layers, errors, progress=progress), "second-order")


def gauss_newton(
    objective: Objective,
    layers: Mapping[str, Layer],
    errors: RoundingErrors,
    *,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> SensitivityTable:
    """The table of d.G d: as `second_order`, without the network's own curvature, at one backward pass an output.

    With more than 64 outputs an example, or a layer whose output has no row for each example, it is estimated, for any number
    of layers and widths, from one backward pass over the first 128 examples; standard errors come from the spread over
    them. Raises as `output_cotangents` does there.
    """
    if _can_be_read_off(objective, layers):
        return _table(*loss_terms(objective, layers, errors, matrix="gauss-newton", progress=progress), "gauss-newton")
    few = first_examples(objective, _DRAWN_EXAMPLES, _DRAWN_BATCH)
    scale = 1.0
    if objective.is_sum:
        scale = sum(map(count_examples, objective.whole_batches())) / sum(map(count_examples, few))
    return _drawn(objective, few, layers, errors, scale, generator, progress)


def is_piecewise_linear(graph: fx.GraphModule, layers: Mapping[str, Layer], example: torch.Tensor) -> bool:
    """Whether the outputs are proven to be piecewise linear in every layer's output: then H and G are the same."""
    run = _Perturbed(graph, layers)
    with torch.enable_grad():
        outputs = run.run(example)
        if not isinstance(outputs, torch.Tensor):
            return False
        found = certify(outputs, run.zeros).values()  # type: ignore[arg-type]  # leaves of a graph, like parameters
    return all(certificate.absent or not certificate.reason for certificate in found)


def _can_be_read_off(objective: Objective, layers: Mapping[str, Layer]) -> bool:
    """Whether a backward pass for each output is affordable and tells every layer's examples apart."""
    graph = objective.model
    assert isinstance(graph, fx.GraphModule)
    run = _Perturbed(graph, layers)
    with torch.enable_grad():
        outputs = run.run(first_examples(objective, 2, 2)[0][0])
    if not isinstance(outputs, torch.Tensor):
        raise TypeError(
            f"the model returns a {type(outputs).__name__}, and 'gauss-newton' needs one tensor: use 'second-order'"
        )
    if has_many_outputs(outputs):
        return False
    absent = {name for name, found in certify(outputs, run.zeros).items() if found.absent}  # type: ignore[arg-type]  # leaves of a graph
    return _separate(outputs, run.zeros) | absent == set(layers)


def has_many_outputs(outputs: Any) -> bool:
    """Whether outputs are so many that a backward pass for each costs more than drawing labels."""
    return isinstance(outputs, torch.Tensor) and outputs[0].numel() > MAX_OUTPUTS


def curves_loss(objective: Objective, batch: Any, outputs: torch.Tensor) -> bool:
    """Whether the loss has a second derivative in the outputs from which `gauss_newton` can draw."""
    with torch.enable_grad():
        (leaf,), loss = loss_in_double(objective, outputs.detach().requires_grad_(True), batch)
    try:
        return len(output_cotangents("sampled", objective, batch, outputs, leaf, loss, ExampleDraws(batch, 0))) > 0
    except ValueError:
        return False


def _drawn(
    objective: Objective,
    few: list[tuple[Any, ...]],
    layers: Mapping[str, Layer],
    errors: RoundingErrors,
    scale: float,
    generator: torch.Generator | None,
    progress: bool,
) -> SensitivityTable:
    """`scale` times d.G d over `few` from one random cotangent an example; whole batches are shared among processes."""
    graph, seed = objective.model, objective.seed(generator)
    assert isinstance(graph, fx.GraphModule)
    separate: set[str] | None = None

    def samples(weighted: tuple[Any, float]) -> dict[str, dict[int, torch.Tensor]]:
        nonlocal separate
        batch, weight = weighted
        run = _Perturbed(graph, layers)
        outputs = run.run(batch[0])
        if separate is None:
            separate = _separate(outputs, run.zeros)
        (leaf,), loss = loss_in_double(objective, outputs, batch)
        (cotangent,) = output_cotangents("sampled", objective, batch, outputs, leaf, loss, ExampleDraws(batch, seed))
        slopes = torch.autograd.grad(
            outputs, list(run.zeros.values()), grad_outputs=cotangent, allow_unused=True, materialize_grads=True
        )
        found: dict[str, dict[int, torch.Tensor]] = {name: {} for name in errors}
        for name, slope in zip(run.zeros, slopes, strict=True):
            rows = len(outputs) if name in separate else 1
            for bits, error in errors[name].items():
                with torch.no_grad():
                    along = (error.of_output(layers[name], run.inputs[name]) * slope).reshape(rows, -1).sum(1)
                found[name][bits] = scale * weight * along.double().square().cpu()
        return found

    with objective.undisturbed():
        batches = Objective(graph, objective.loss, few, items=objective.items).weighted_batches()
        bar = tqdm(batches, desc="Gauss-Newton", unit="batch", disable=not progress)
        parts = objective.each(samples, bar)
    omega: Terms = {name: {} for name in errors}
    stderr: Terms = {name: {} for name in errors}
    for name, row in errors.items():
        for bits in row:
            values = torch.cat([part[name][bits] for part in parts])
            omega[name][bits] = float(values.sum())
            stderr[name][bits] = float(values.std() * math.sqrt(len(values))) if len(values) > 1 else math.inf
    return SensitivityTable(omega, stderr, "gauss-newton", predicts=0.5)


def _separate(outputs: torch.Tensor, zeros: Mapping[str, torch.Tensor]) -> set[str]:
    """The layers whose outputs have rows of one example each. Of others only the sum over the batch is known, whose square has
    the same mean, because cotangents of different examples are independent and have none."""
    uses = {name: found.use for name, found in certify(outputs, zeros).items()}  # type: ignore[arg-type]  # leaves of a graph
    edges = {name: GradientEdge(use.node, 0) for name, use in uses.items() if use and len(zeros[name]) % len(outputs) == 0}
    mixing = mixing_nodes(outputs, list(edges.values())) if edges else {}
    return {name for name, edge in edges.items() if edge.node not in mixing}


def _table(first: Terms, second: Terms, method: str) -> SensitivityTable:
    omega = {name: {bits: max(value, 0.0) for bits, value in row.items()} for name, row in second.items()}
    stderr = {name: dict.fromkeys(row, 0.0) for name, row in omega.items()}
    slope = sum(abs(value) for row in first.values() for value in row.values())
    curvature = sum(value / 2 for row in omega.values() for value in row.values())
    note = ""
    if slope > _NOTED * curvature:
        ratio = f"{slope / curvature:.0%} of" if curvature else "all beside"
        note = f"the loss is not at a minimum: first-order terms, left out here, add up in magnitude to {ratio} the others"
    return SensitivityTable(omega, stderr, method, predicts=0.5, note=note)


def _from_outputs(
    objective: Objective,
    batch: Any,
    outputs: Any,
    zeros: Mapping[str, torch.Tensor],
    changes: Mapping[str, torch.Tensor],
    *,
    whole: bool,
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """d.G d for one batch, (widths,), and the layers where that is unknown or, if the `whole` d.H d is wanted, not the same."""
    if not isinstance(outputs, torch.Tensor) or outputs.dim() < 1 or has_many_outputs(outputs):
        return {}, list(zeros)
    (leaf,), loss = loss_in_double(objective, outputs, batch)
    try:
        cotangents, signs = output_curvature_factors(leaf, loss, outputs)
    except OutputCurvatureError:
        return {}, list(zeros)
    certificates = certify(outputs, zeros)  # type: ignore[arg-type]  # leaves of a graph, like parameters
    uses = {
        name: found.use
        for name, found in certificates.items()
        if found.use is not None and not (whole and found.reason) and len(zeros[name]) % len(outputs) == 0
    }
    mixing = mixing_nodes(outputs, [GradientEdge(use.node, 0) for use in uses.values()]) if uses else {}
    separate = [name for name, use in uses.items() if use.node not in mixing]
    terms = {
        name: torch.zeros(len(change), dtype=torch.float64)
        for name, change in changes.items()
        if name in separate or certificates[name].absent
    }
    for cotangent, sign in zip(cotangents, signs, strict=True) if separate else ():
        slopes = torch.autograd.grad(outputs, [zeros[name] for name in separate], grad_outputs=cotangent, retain_graph=True)
        for name, slope in zip(separate, slopes, strict=True):
            by_example = changes[name].reshape(len(terms[name]), len(sign), -1).transpose(0, 1)
            along = (by_example @ slope.reshape(len(sign), -1, 1)).squeeze(2).double()
            terms[name] += (along.square() * sign[:, None]).sum(0).cpu()
    return terms, [name for name in zeros if name not in terms]


def _slopes(loss: torch.Tensor, zeros: Mapping[str, torch.Tensor], *, create_graph: bool) -> dict[str, torch.Tensor]:
    """The gradient of the loss in every layer's output."""
    found = torch.autograd.grad(
        loss, list(zeros.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return dict(zip(zeros, found, strict=True))


def _second_backward(
    slopes: Mapping[str, torch.Tensor], zeros: Mapping[str, torch.Tensor], changes: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """d.H d, (widths,), by differentiating the gradients in the layers' outputs once more."""
    differentiable_twice(slopes.values())
    terms = {name: torch.zeros(len(changes[name]), dtype=torch.float64) for name in slopes}
    for name, slope in slopes.items():
        for position, change in enumerate(changes[name]) if slope.requires_grad else ():
            (product,) = torch.autograd.grad(
                slope, zeros[name], grad_outputs=change, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            terms[name][position] = float((product * change).sum(dtype=torch.float64))
    return terms
