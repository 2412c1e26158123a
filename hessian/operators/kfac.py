r"""Kronecker-factored approximations of the Gauss-Newton and Fisher matrices: KFAC and EKFAC.

Each weight of a linear or convolutional layer brings a block, read off the autograd graph at the layer's one node; each bias,
and each scale and shift of a batch norm, its dense block. Curvature between two parameter tensors is left out.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from hessian.estimators.gradient_factors import GradientFactors
from hessian.estimators.layer_gradients import LayerGradients, layer_gradients
from hessian.estimators.per_example import is_vector, vector_gradients
from hessian.objective import Data, LossFunction, Objective
from hessian.operators.hessian import Hessian
from hessian.operators.kronecker import KroneckerBlock, KroneckerOperator, dense_block, kronecker_product, zero_block
from hessian.output_curvature import Kind, check_kind
from hessian.parameters import Selection, requiring_grad
from hessian.structure import WeightUse

MAX_VECTOR = 2048  # elements of a bias, a scale or a shift: its block is dense


class KFAC(KroneckerOperator):
    r"""The Gauss-Newton matrix, its block of each weight replaced by one Kronecker product.

    In example n a layer's weight (O, K) meets inputs :math:`x_{np} \in R^K` at positions p, and backward passes from the
    cotangents :math:`u_{nc}` bring it :math:`y_{ncp} \in R^O`, where :math:`\sum_c u_{nc} u_{nc}^\top` is the loss's second
    derivative in example n's outputs. Its block of the Gauss-Newton matrix, on the left, is approximated by the right:

    .. math:: \sum_{n,c} \mathrm{vec}(g_{nc})\, \mathrm{vec}(g_{nc})^\top
              \;\approx\; \Big( \sum_{n,c,p} y_{ncp}\, y_{ncp}^\top \Big) \otimes
              \Big( \frac{1}{|R|} \sum_{(n,p) \in R} x_{np}\, x_{np}^\top \Big),
              \qquad g_{nc} = \sum_p y_{ncp}\, x_{np}^\top,

    with R all positions of all examples that the loss counts (their u are not zero). Every position is taken for an example
    of its own: KFC for convolutions, "expand" elsewhere. With one position, the two sides agree where the
    :math:`\sum_c y_{nc} y_{nc}^\top` or the :math:`x_n x_n^\top` are the same for all n. The cotangents carry the loss's
    averaging, so that any split of the data into batches gives the same matrix. A grouped layer has such a block for each
    group. Vectors (biases, a batch norm's scale and shift; up to MAX_VECTOR elements) keep their exact dense blocks.

    `kind` says where the cotangents come from. "exact": one backward pass for each of an example's outputs. "sampled": one
    for each batch, which makes the matrix of y unbiased; labels are drawn from the softmax, other losses get random signs
    (`generator=None` draws from torch's global generator). "empirical": the gradients of the items' losses, with which
    `Fisher` is approximated instead of `GaussNewton`.

    Coordinates follow `named_parameters` order. The parameters' values and the modules' modes are those at the time of the
    call; nothing of the model is changed. `model` may be an Objective; loss and data are then None.

    ValueError for a parameter whose per-example gradients cannot be read (shared, computed, of a layer norm, an embedding, a
    batch norm in training mode), and for a loss that couples examples or is not convex in the outputs.

    Source: Martens & Grosse, 2015 (arXiv:1503.05671); Grosse & Martens, 2016 (arXiv:1602.01407); for "expand",
    Eschenhagen et al., 2023 (arXiv:2311.00636).
    """

    def __init__(
        self,
        model: nn.Module | Objective,
        loss: LossFunction | None = None,
        data: Data | None = None,
        params: Selection = None,
        *,
        kind: Kind = "exact",
        generator: torch.Generator | None = None,
    ) -> None:
        check_kind(kind)
        checked = Hessian(model, loss, data, params)  # of the same coordinates
        self.objective, self.parameters, self.kind = checked.objective, checked.parameters, kind
        device = "cpu" if generator is None else generator.device
        # a seed, so that another pass over the data draws the same
        self._seed = int(torch.randint(2**62, (), generator=generator, device=device)) if kind == "sampled" else 0
        sums: dict[str, _WeightSums | _VectorSum] = {}
        self._outputs_square = self._visit(partial(self._add, sums))
        blocks = {
            name: sums[name].block() if name in sums else zero_block(parameter.numel(), parameter)
            for name, parameter in self.parameters.items()  # zero: outputs that do not depend on it, a loss without curvature
        }
        super().__init__(blocks, checked.dtype)

    def _visit(self, add: Callable[[LayerGradients], None]) -> float:
        """One pass over the data, part by part; returns the sum of the outputs' squares."""
        with self.objective.undisturbed():
            self.objective.total_weight()  # a pass of its own, lest what is drawn differ between the first visit and the next
        square = 0.0
        with requiring_grad(self.parameters), self.objective.undisturbed():
            for part in layer_gradients(self.objective, self.parameters, self.kind, self._seed):
                with torch.no_grad():
                    add(part)
                square += part.outputs_square
                del part  # with it goes the batch's graph, before the next is made
        return square

    def _add(self, sums: "dict[str, _WeightSums | _VectorSum]", part: LayerGradients) -> None:
        for name, use in part.uses.items():
            if name not in sums:
                sums[name] = _VectorSum(name) if is_vector(use) else _WeightSums(name)
            sums[name].add(part, use, self.parameters[name])


class EKFAC(KFAC):
    r"""KFAC with the best eigenvalues for its eigenvectors.

    .. math:: (U_Y \otimes U_X)\, \mathrm{diag}(S)\, (U_Y \otimes U_X)^\top, \qquad
              S_{ij} = \sum_{n,c} \big( U_Y^\top g_{nc}\, U_X \big)_{ij}^2

    with U_Y and U_X the eigenvectors of KFAC's two factors and g as there: S are the second moments of the per-example
    gradients, rotated into KFAC's eigenbasis. No other S is closer to the Gauss-Newton matrix's block in the Frobenius norm,
    and the trace is that block's. S takes a second pass over the data, which must be the same as the first.

    Arguments and errors are KFAC's; ValueError too if the two passes see different outputs.

    Source: George et al., 2018 (arXiv:1806.03884).
    """

    def __init__(
        self,
        model: nn.Module | Objective,
        loss: LossFunction | None = None,
        data: Data | None = None,
        params: Selection = None,
        *,
        kind: Kind = "exact",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model, loss, data, params, kind=kind, generator=generator)
        squares: dict[str, torch.Tensor] = {}
        first, second = self._outputs_square, self._visit(partial(self._add_squares, squares))
        if abs(second - first) > 1e-5 * first:
            raise ValueError(
                f"two passes over the data see different outputs (sums of squares {first:.9g} and {second:.9g}): pass data "
                "that is the same each time it is iterated, and a model that draws from no generator of its own"
            )
        self.blocks |= {name: self.blocks[name].with_values(values) for name, values in squares.items()}

    def _add_squares(self, squares: dict[str, torch.Tensor], part: LayerGradients) -> None:
        for name, use in part.uses.items():
            if not is_vector(use):
                found = part.weight * _rotated_squares(_factors(part, use, self.parameters[name]), self.blocks[name])
                squares[name] = squares[name] + found if name in squares else found


class _VectorSum:
    """A vector's Gauss-Newton block, as far as it has been added up."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._matrix = torch.zeros(())

    def add(self, part: LayerGradients, use: WeightUse, parameter: nn.Parameter) -> None:
        if parameter.numel() > MAX_VECTOR:
            raise ValueError(
                f"the dense block of {self._name!r} would have {parameter.numel():,} rows, more than {MAX_VECTOR:,}: leave it "
                "out with params= (names or globs of the others)"
            )
        for gradient in part.gradients[use.node]:
            rows = _at_least_single(vector_gradients(use, gradient, len(part.counted)))
            self._matrix = self._matrix + part.weight * (rows.T @ rows)

    def block(self) -> KroneckerBlock:
        return dense_block(self._matrix)


class _WeightSums:
    """A weight's two factors, as far as they have been added up."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._positions = 0
        self._inputs = self._outputs = torch.zeros(())
        self._layout: tuple[int, bool] | None = None

    def add(self, part: LayerGradients, use: WeightUse, parameter: nn.Parameter) -> None:
        factors = _factors(part, use, parameter)
        layout = (factors.groups, factors.inputs_first)
        if self._layout not in (None, layout):
            raise ValueError(f"{self._name!r} enters different operations in different batches: leave it out with params=")
        self._layout = layout
        for examples in factors.chunks():
            if part.is_first:
                inputs = factors.inputs(examples)[part.counted[examples]]
                self._inputs = self._inputs + _second_moment(inputs)
                self._positions += len(inputs) * factors.positions
            for gradients in factors.output_gradients(examples):
                self._outputs = self._outputs + part.weight * _second_moment(gradients)

    def block(self) -> KroneckerBlock:
        assert self._layout is not None
        inputs = self._inputs / max(self._positions, 1)
        _, inputs_first = self._layout
        return kronecker_product(inputs, self._outputs) if inputs_first else kronecker_product(self._outputs, inputs)


def _factors(part: LayerGradients, use: WeightUse, parameter: nn.Parameter) -> GradientFactors:
    return GradientFactors(use, parameter, part.gradients[use.node], len(part.counted))


def _second_moment(tensor: torch.Tensor) -> torch.Tensor:
    """(N, G, K, P) to (G, K, K): the sum of outer products over examples and positions."""
    columns = _at_least_single(tensor).permute(1, 2, 0, 3).flatten(2)
    return columns @ columns.mT


def _rotated_squares(factors: GradientFactors, block: KroneckerBlock) -> torch.Tensor:
    """Squares of the per-example gradients in the block's basis, summed over cotangents and examples: (G, R, C)."""
    of_inputs, of_outputs = (block.left, block.right) if factors.inputs_first else (block.right, block.left)
    total = torch.zeros(())
    for examples in factors.chunks():
        inputs = torch.einsum("gka,ngkp->ngap", of_inputs, factors.inputs(examples).to(of_inputs))
        for gradients in factors.output_gradients(examples):
            outputs = torch.einsum("goa,ngop->ngap", of_outputs, gradients.to(of_outputs))
            if factors.positions == 1:
                total = total + torch.einsum("ngop,ngkp->gok", outputs.square(), inputs.square())
            else:
                total = total + (outputs @ inputs.mT).square().sum(0)
    return total.mT if factors.inputs_first else total


def _at_least_single(tensor: torch.Tensor) -> torch.Tensor:
    """Half precisions in float32: sums over data would not fit theirs."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
