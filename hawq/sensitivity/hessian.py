r"""HAWQ-V2: the average Hessian trace times the squared rounding error (Dong et al. 2020, equation 10).

.. math:: \Omega_i(b) = \frac{\mathrm{Tr}(H_i)}{n_i} \, \|Q_b(W_i) - W_i\|_2^2

Half of the sum over layers is the expected increase of the loss, if rounding errors point in no particular direction.
"""

from collections.abc import Mapping

import torch
from torch import fx

from hawq.augmentation import augmented
from hawq.graph import Layer
from hawq.sensitivity.second_order import has_many_outputs, is_piecewise_linear
from hawq.sensitivity.subset import first_examples
from hawq.sensitivity.table import Errors, SensitivityTable
from hessian.estimators.layers import layer_report
from hessian.objective import Objective
from hessian.results import LayerReport
from hessian.torch_losses import is_classification

_RTOL = 0.1  # of a trace: widths change by factors of four
_ROUGH_RTOL = 0.3
_ROUGH_EXAMPLES = 64
_ROUGH_PROBES = 16  # of four to six gradients each
_ROUGH_BATCH = 32  # a graph held for eight draws at 64 images of 160x160 takes three times as long, for its memory


def layer_traces(
    objective: Objective,
    layers: Mapping[str, Layer],
    *,
    augment: bool = True,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> LayerReport:
    """The Hessian trace of every layer's weight, `objective.model` being the traced graph that the layers are of.

    To 10%, and over all data, where the network is piecewise linear and has few outputs. Rougher, and of the first 64
    examples, where products with its Hessian are sampled, or where an example has so many outputs that labels are drawn (see
    `hessian.layer_report`). augment: disturb every fourth image (see `hawq.augmentation`) where labels are drawn, so that
    the targets do not matter.
    """
    assert isinstance(objective.model, fx.GraphModule)
    weights = [layer.weight for layer in layers.values()]
    batch = first_examples(objective, 2, 2)[0]
    outputs = objective.outputs(batch)
    linear = is_piecewise_linear(objective.model, layers, batch[0][:2])
    if linear and not has_many_outputs(outputs):
        return layer_report(objective, params=weights, rtol=_RTOL, generator=generator, progress=progress)
    few = first_examples(objective, _ROUGH_EXAMPLES, _ROUGH_BATCH)
    if augment and linear and is_classification(objective.loss):
        own = torch.Generator().manual_seed(objective.seed(generator))
        inputs = augmented([batch[0] for batch in few], own)
        few = [(changed, *batch[1:]) for changed, batch in zip(inputs, few, strict=True)]
    return layer_report(
        objective.over_whole(few),
        params=weights,
        rtol=_ROUGH_RTOL,
        max_probes=_ROUGH_PROBES,
        generator=generator,
        progress=progress,
    )


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
