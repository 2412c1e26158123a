r"""ZeroQ: what rounding one layer alone does to the outputs (Cai et al. 2020, equation 6).

.. math:: \Omega_i(b) = \frac1N \sum_n \mathrm{KL}\big( f(x_n) \,\|\, f_{i,b}(x_n) \big)

between the float network's class probabilities and those of the network in which layer i alone has b bits. Outputs that are
no class scores are compared by their mean squared difference.
"""

from collections.abc import Mapping

import torch
from torch import fx, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from hawq.graph import Layer, input_node
from hawq.sensitivity.rounded import RoundingErrors
from hawq.sensitivity.table import SensitivityTable
from hessian.objective import Objective
from hessian.torch_losses import is_classification, loss_setting

Sums = tuple[torch.Tensor, torch.Tensor]  # by example: the sum over its items, (N,), and their number, (N,)


@torch.no_grad()
def kl(
    objective: Objective, layers: Mapping[str, Layer], errors: RoundingErrors, *, progress: bool = False
) -> SensitivityTable:
    """The table, in nats an item; standard errors from the spread over examples.

    For each layer and width the operations behind the layer are run anew, the others once. A cross-entropy or negative
    log-likelihood, in torch.nn's form, shows that outputs are class scores. TypeError for outputs that are not one tensor.
    """
    found = objective.gathered(lambda: _own_sums(objective, layers, errors, progress))
    omega: dict[str, dict[int, float]] = {name: {} for name in errors}
    stderr: dict[str, dict[int, float]] = {name: {} for name in errors}
    for name, row in errors.items():
        for bits in row:
            values, counts = (torch.cat(part) for part in zip(*(s for own in found for s in own[name, bits]), strict=True))
            omega[name][bits], stderr[name][bits] = _ratio(values, counts)
    note = "" if is_classification(objective.loss) else "mean squared differences of outputs, which are no class scores"
    return SensitivityTable(omega, stderr, "kl", predicts=_predicts(objective), note=note)


def _own_sums(
    objective: Objective, layers: Mapping[str, Layer], errors: RoundingErrors, progress: bool
) -> dict[tuple[str, int], list[Sums]]:
    """By layer and width, batch by batch of this process's data."""
    graph = objective.model
    assert isinstance(graph, fx.GraphModule)
    parts: dict[tuple[str, int], list[Sums]] = {(name, bits): [] for name, row in errors.items() for bits in row}
    behind = {name: _behind(graph, layer.node) for name, layer in layers.items()}
    for batch in tqdm(objective.batches(), desc="outputs", unit="batch", disable=not progress):
        whole = fx.Interpreter(graph, garbage_collect_values=False)
        outputs = whole.run(batch[0])
        if not isinstance(outputs, torch.Tensor):
            raise TypeError(f"the model returns a {type(outputs).__name__}: outputs are compared where they are one tensor")
        for name, layer in layers.items():
            kept = {node: value for node, value in whole.env.items() if node not in behind[name]}
            for bits, error in errors[name].items():
                change = error.of_output(layer, kept[input_node(layer.node)])
                moved = fx.Interpreter(graph).run(batch[0], initial_env=kept | {layer.node: kept[layer.node] + change})
                parts[name, bits].append(_divergence(objective, outputs, moved, batch[1]))
    return parts


def _behind(graph: fx.GraphModule, start: fx.Node) -> set[fx.Node]:
    """The nodes that `start` reaches."""
    reached = {start}
    for node in graph.graph.nodes:
        if any(read in reached for read in node.all_input_nodes):
            reached.add(node)
    return reached - {start}


def _divergence(objective: Objective, outputs: torch.Tensor, moved: torch.Tensor, targets: object) -> Sums:
    if not is_classification(objective.loss):
        values = (moved.double() - outputs.double()).square().flatten(1).mean(1)
        return values, torch.ones_like(values)
    before, after = outputs.double().log_softmax(1), moved.double().log_softmax(1)
    values = F.kl_div(after, before, reduction="none", log_target=True).sum(1)
    counted = torch.ones_like(values)
    if isinstance(targets, torch.Tensor) and not targets.is_floating_point():
        counted = (targets != loss_setting(objective.loss, "ignore_index", -100)).to(values)
    return (values * counted).reshape(len(values), -1).sum(1), counted.reshape(len(values), -1).sum(1)


def _ratio(values: torch.Tensor, counts: torch.Tensor) -> tuple[float, float]:
    """The mean over items and its standard error, with examples independent of each other (a ratio estimator)."""
    total = counts.sum()
    if not total:
        raise ValueError("no item of the data counts: the loss ignores every target")
    mean = values.sum() / total
    if len(values) < 2:
        return float(mean), float("inf")
    spread = (values - mean * counts).square().sum() * len(values) / (len(values) - 1)
    return float(mean), float(spread.sqrt() / total)


def _predicts(objective: Objective) -> float | None:
    """1 where the mean divergence is the loss's expected increase for targets drawn from the float network's predictions."""
    loss = objective.loss
    if objective.is_sum or loss_setting(loss, "weight", None) is not None or loss_setting(loss, "label_smoothing", 0.0):
        return None
    return 1.0 if is_classification(loss) or isinstance(loss, nn.MSELoss) or loss is F.mse_loss else None
