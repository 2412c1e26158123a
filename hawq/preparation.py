"""The float network made ready: its graph with batch norm folded, its weights moved to where they round better."""

from collections.abc import Sequence

import torch
from torch import fx, nn

from hawq.batch_norm import reestimated
from hawq.equalization import equalized
from hawq.fold import folded
from hawq.smoothquant import smoothed


def prepared(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    *,
    reestimate_batch_norm: bool = False,
    equalize: bool = False,
    smooth: bool = False,
) -> fx.GraphModule:
    """The graph that sensitivities and `quantize_model` take in place of `model`, which is not changed.

    inputs: calibration batches. reestimate_batch_norm: move the stored statistics toward those of the inputs first (see
    `hawq.batch_norm`). equalize: even out the ranges of channels between layers (`hawq.equalization`). smooth: move the
    spread of activations into weights (`hawq.smoothquant`). The last two keep the function that the network computes.
    """
    graph: nn.Module = model
    if reestimate_batch_norm:
        graph, _ = reestimated(graph, inputs)
    result = folded(graph, inputs[0][:2])
    if equalize:
        result, _, _ = equalized(result)
    if smooth:
        result, _, _ = smoothed(result, inputs)
    return result
