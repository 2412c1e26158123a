r"""The two matrices whose product is a weight's per-example gradient, from what the autograd graph already keeps.

In example n, group g of a linear or convolutional layer's weight meets inputs X (K, P) at P positions and receives output
gradients Y (O, P) there: the gradient in its part of the weight, as an (O, K) matrix, is :math:`Y X^\top`. For a transposed
convolution X are the input's channels at its own positions, Y the patches of output gradients that each of them reaches.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import nn

from hessian.estimators.per_example import by_example, by_position, matrix_input, unfold_patches
from hessian.structure import WeightUse, operation

_BYTES = 64 * 2**20  # of unfolded patches, or of per-example gradients, at a time


class GradientFactors:
    r"""Inputs and output gradients of one weight in one batch, a few examples at a time.

    `gradients`: for each cotangent, the gradient at the output of `use.node`; its first dimension is a multiple of
    `num_examples`, example after example. groups: G. inputs_first: whether the weight is laid out as (G, K, O), its gradient
    being :math:`X Y^\top`, instead of (G, O, K).
    """

    def __init__(self, use: WeightUse, parameter: nn.Parameter, gradients: Sequence[torch.Tensor], num_examples: int) -> None:
        node = use.node
        self._gradients, self._num_examples = gradients, num_examples
        self._settings: tuple[Any, ...] = ()  # of a convolution
        if use.operation == "Convolution":
            self._inputs = node._saved_input  # type: ignore[attr-defined]
            self.groups = int(node._saved_groups)  # type: ignore[attr-defined]
            self.inputs_first = bool(node._saved_transposed)  # type: ignore[attr-defined]
            kernel = tuple(parameter.shape[2:])
            positions = tuple((self._inputs if self.inputs_first else gradients[0]).shape[2:])
            strides = node._saved_stride, node._saved_padding, node._saved_dilation  # type: ignore[attr-defined]
            self._settings = (kernel, positions, *strides, self.groups)
        else:
            inputs = matrix_input(node)
            assert inputs is not None
            self._inputs, self.groups, self.inputs_first = inputs, 1, not _enters_transposed(use)
            kernel, positions = (), ()
        self._repeats = len(self._inputs) // num_examples  # rows of the layer's input, for each example
        self.positions = self._repeats * prod(positions)
        unfolded = gradients[0] if self.inputs_first else self._inputs
        patches = unfolded[: self._repeats].numel() * prod(kernel)
        products = parameter.numel() if self.positions > 1 else 0
        self._step = max(1, _BYTES // (max(patches, products, 1) * self._inputs.element_size()))

    def chunks(self) -> Iterator[slice]:
        """Slices of examples, few enough for their patches, and their gradients where P > 1, to fit in memory."""
        for start in range(0, self._num_examples, self._step):
            yield slice(start, min(start + self._step, self._num_examples))

    def inputs(self, examples: slice) -> torch.Tensor:
        """X of some examples: (N, G, K, P)."""
        return self._factor(self._inputs, examples, unfolded=not self.inputs_first)

    def output_gradients(self, examples: slice) -> Iterator[torch.Tensor]:
        """Y of some examples, one cotangent after the other: (N, G, O, P)."""
        for gradient in self._gradients:
            yield self._factor(gradient, examples, unfolded=self.inputs_first)

    def _factor(self, tensor: torch.Tensor, examples: slice, *, unfolded: bool) -> torch.Tensor:
        rows = tensor[examples.start * self._repeats : examples.stop * self._repeats]
        if not self._settings:
            return rows.unflatten(0, (-1, self._repeats)).transpose(1, 2).unsqueeze(1)
        pieces = unfold_patches(rows, *self._settings) if unfolded else by_position(rows, self.groups)
        return by_example(pieces, self._repeats)


def _enters_transposed(use: WeightUse) -> bool:
    """Whether a matrix product multiplies by the weight's transpose, as linear layers do."""
    node, transposed = use.node.next_functions[use.slot][0], False
    while node is not None and node.next_functions:
        transposed ^= operation(node) == "T" or node._saved_dim0 % 2 != node._saved_dim1 % 2  # type: ignore[attr-defined]
        node = node.next_functions[0][0]
    return transposed
