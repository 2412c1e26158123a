"""Do the rows of a layer's output belong to one example each, in the order of the batch?"""

from collections.abc import Sequence

import torch
from torch.autograd.graph import GradientEdge, Node

_SCALES = 32  # powers of two that tell examples apart, of which a float32 holds more


def mixing_nodes(outputs: torch.Tensor, edges: Sequence[GradientEdge]) -> dict[Node, str]:
    """The nodes whose rows do not belong to one example each, in order, and what is wrong with them.

    If an example's rows receive gradient from that example alone, then scaling each example's cotangent by a power of two
    scales its rows' gradients by the same, to the last bit. Every two examples get different powers in some round.
    """
    count = len(outputs)
    own = torch.Generator().manual_seed(0)  # a check reaches no result and must not advance anybody's generator
    cotangent = torch.randn(outputs.shape, generator=own, dtype=torch.float64).to(outputs)
    plain = torch.autograd.grad(outputs, edges, grad_outputs=cotangent, retain_graph=True)
    wrong = {
        edge.node: f"its layer sees {len(gradient)} rows for {count} examples"
        for edge, gradient in zip(edges, plain, strict=True)
        if gradient.shape[0] % count
    }
    digits = torch.arange(count, device=outputs.device)
    while bool(digits.any()):
        powers = torch.pow(2.0, digits % _SCALES).to(outputs)
        digits = digits // _SCALES
        scaled = torch.autograd.grad(outputs, edges, grad_outputs=cotangent * _first(powers, cotangent), retain_graph=True)
        for edge, before, after in zip(edges, plain, scaled, strict=True):
            if edge.node not in wrong:
                rows = powers.repeat_interleave(before.shape[0] // count)
                if not torch.equal(after, before * _first(rows, before)):
                    wrong[edge.node] = "its layer's rows do not belong to one example each, in the order of the batch"
    return wrong


def _first(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(N,) values, shaped to multiply `like` along its first dimension."""
    return values.view(-1, *(1,) * (like.dim() - 1))
