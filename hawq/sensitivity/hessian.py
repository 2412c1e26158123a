r"""HAWQ-V2: the average Hessian trace times the squared rounding error (Dong et al. 2020, equation 10).

.. math:: \Omega_i(b) = \frac{\mathrm{Tr}(H_i)}{n_i} \, \|Q_b(W_i) - W_i\|_2^2

Half of the sum over layers is the expected increase of the loss, if rounding errors point in no particular direction.
"""

from collections.abc import Mapping

import torch
from torch import fx

from hawq.augmentation import augmented
from hawq.graph import Layer
from hawq.sensitivity.second_order import is_piecewise_linear
from hawq.sensitivity.table import Errors, SensitivityTable
from hessian.estimators.exact_trace import MAX_OUTPUTS
from hessian.estimators.layers import layer_report
from hessian.objective import Objective
from hessian.results import LayerReport

Batches = list[tuple[torch.Tensor, torch.Tensor]]

_RTOL = 0.1  # of a trace: widths change by factors of four
_ROUGH_RTOL = 0.3
_ROUGH_EXAMPLES = 64
_ROUGH_PROBES = 16  # of four to six gradients each
_MANY_OUTPUTS_BATCH = 32  # a graph held for eight draws at 64 images of 160x160 takes three times as long, for its memory


def layer_traces(
    objective: Objective, layers: Mapping[str, Layer], *, generator: torch.Generator | None = None, progress: bool = False
) -> LayerReport:
    """The Hessian trace of every layer's weight.

    To 10%, and over all data, where that is exact. Rougher, and of the first 64 examples, where the network is not piecewise
    linear and products with its Hessian are sampled, or where an example has so many outputs that labels are drawn (see
    `hessian.layer_report`); in the latter case every second image is disturbed (see `hawq.augmentation`).
    """
    weights = [layer.weight for layer in layers.values()]
    outputs = objective.outputs(next(iter(objective.batches())))
    if isinstance(outputs, torch.Tensor) and outputs[0].numel() > MAX_OUTPUTS:
        few = _disturbed(_first(objective, _ROUGH_EXAMPLES), generator)
    elif isinstance(objective.model, fx.GraphModule) and not is_piecewise_linear(objective.model, layers, _example(objective)):
        few = _first(objective, _ROUGH_EXAMPLES)
    else:
        return layer_report(objective, params=weights, rtol=_RTOL, generator=generator, progress=progress)
    rough = Objective(objective.model, objective.loss, few)
    return layer_report(
        rough, params=weights, rtol=_ROUGH_RTOL, max_probes=_ROUGH_PROBES, generator=generator, progress=progress
    )


def _example(objective: Objective) -> torch.Tensor:
    example: torch.Tensor = next(iter(objective.batches()))[0][:2]
    return example


def _disturbed(batches: Batches, generator: torch.Generator | None) -> Batches:
    """The batches cut into smaller ones, with disturbed images among their inputs."""
    parts = [part for batch in batches for part in zip(*(tensor.split(_MANY_OUTPUTS_BATCH) for tensor in batch), strict=True)]
    inputs = augmented([part[0] for part in parts], generator)
    return [(changed, targets) for changed, (_, targets) in zip(inputs, parts, strict=True)]


def _first(objective: Objective, count: int) -> Batches:
    """Batches of the first `count` examples."""
    batches: Batches = []
    for inputs, targets in objective.batches():
        left = count - sum(len(batch[0]) for batch in batches)
        if left <= 0:
            break
        batches.append((inputs[:left], targets[:left]))
    return batches


def hessian_trace(layers: Mapping[str, Layer], errors: Errors, traces: LayerReport) -> SensitivityTable:
    """The table from the layers' squared rounding errors and the traces of their weights.

    A sampled trace that came out below its standard error counts as that: noise must not make a layer seem free.
    """
    omega, stderr = {}, {}
    for name, layer in layers.items():
        row = traces[layer.weight]
        mean = max(row.trace, row.trace_stderr) / row.num_params
        omega[name] = {bits: mean * error for bits, error in errors[name].items()}
        stderr[name] = {bits: row.trace_stderr / row.num_params * error for bits, error in errors[name].items()}
    return SensitivityTable(omega, stderr, "hessian-trace", predicts=0.5)
