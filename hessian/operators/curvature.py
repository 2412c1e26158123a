"""What all curvature matrices of an objective share: parameters, batches, one kept batch, blocks."""

import contextlib
import warnings
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn

from hessian.batch import count_examples, split_batch, tensors_of
from hessian.memory import check_fits, saved_bytes
from hessian.objective import Data, LossFunction, LossNotFiniteError, Objective
from hessian.operators.base import LinearOperator
from hessian.parameters import Selection, flatten, requiring_grad, select_parameters, unflatten
from hessian.second_backward import CheapSecondBackward
from hessian.space import VectorSpace
from hessian.structure import missing_derivative

Tensors = dict[str, torch.Tensor]
Multiply = Callable[[Tensors], Tensors]  # from a direction to the product, both by parameter name

_NO_SECOND_DERIVATIVE = ("derivative for", "is not implemented", "once_differentiable", "not differentiable", "double backward")


_SHORTEST_STEP = 10  # how many steps of a finite difference are tried, each a quarter of the last
_AGREEMENT = 0.1  # in cube roots of epsilon, the relative error that central differences can reach at best


class NoSecondDerivativeError(RuntimeError):
    """Part of the model can be differentiated only once; the text says which."""


def differentiable_twice(gradients: Iterable[torch.Tensor]) -> None:
    """NoSecondDerivativeError where autograd would silently treat part of these first derivatives as constant."""
    missing = missing_derivative([gradient for gradient in gradients if gradient.grad_fn is not None])
    if missing:
        raise NoSecondDerivativeError(f"no second derivative (there is {missing})")


class CurvatureOperator(LinearOperator):
    """A curvature matrix of the data set's loss in the selected parameters.

    Coordinates follow `named_parameters` order. The parameters' current values and the modules' current modes count;
    nothing of the model is changed.

    Where the data is one batch, the graph of its first derivatives is kept and every product is one more backward pass;
    otherwise each pass over the data builds a batch's graph once for all vectors of a block. `micro_batch` cuts batches
    into that many examples at a time, with the same result and less memory. `method` tells how products are
    computed: "double backward", or "finite differences" where the model has no second derivatives.
    """

    def __init__(
        self,
        model: nn.Module | Objective,
        loss: LossFunction | None = None,
        data: Data | None = None,
        params: Selection = None,
        *,
        micro_batch: int | None = None,
    ) -> None:
        self.objective = as_objective(model, loss, data, micro_batch)
        self.parameters = select_parameters(self.objective.model, params)
        first = next(iter(self.parameters.values()))
        for name, parameter in self.parameters.items():
            if (parameter.dtype, parameter.device) != (first.dtype, first.device):
                raise TypeError(
                    f"parameter {name!r} is {parameter.dtype} on {parameter.device}, others are {first.dtype} on "
                    f"{first.device}: select parameters of one kind"
                )
        size = sum(parameter.numel() for parameter in self.parameters.values())
        self.shape, self.dtype, self.device = (size, size), first.dtype, first.device
        self._source = _Source(self.parameters)

    @abstractmethod
    def _differentiate(self, batch: Any, parameters: Mapping[str, nn.Parameter]) -> Multiply:
        """Products with the matrix of one batch's loss, by automatic differentiation."""

    @abstractmethod
    def _difference(self, batch: Any, parameters: Mapping[str, nn.Parameter]) -> Multiply:
        """The same by finite differences, for models without second derivatives."""

    @property
    def space(self) -> VectorSpace:
        return self.objective.space(self.shape[0], self.dtype, self.device)

    @property
    def method(self) -> str:
        return "finite differences" if self._source.differences else "double backward"

    def block(self, params: Selection) -> Self:
        """The diagonal block of the parameters that `params` (names, globs) chooses; it shares the kept graph."""
        block = self._with(params)
        if set(block.parameters) <= set(self._source.parameters):
            block._source = self._source
        return block

    def gradient(self) -> torch.Tensor:
        """The gradient of the data set's loss in the operator's parameters, (P,)."""
        return self.loss_and_gradient()[1]

    def loss_and_gradient(self) -> tuple[float, torch.Tensor]:
        """The data set's loss and its gradient, (P,)."""
        value = 0.0

        def compute() -> torch.Tensor:
            nonlocal value
            value, gradient = self._own_loss_and_gradient()
            return gradient

        gradient = self.objective.total(compute, (self.space.local_size,), self.dtype)
        return sum(self.objective.gathered(lambda: value)), gradient

    def loss_value(self) -> float:
        """The data set's loss at the parameters' current values, which may be infinite, without its gradient."""

        def compute() -> float:
            value = 0.0
            with self.objective.undisturbed(), torch.no_grad():
                for batch, weight in self.objective.own_batches():
                    try:
                        value += weight * float(self.objective.batch_loss(self.objective.outputs(batch), batch))
                    except LossNotFiniteError:  # processes that compute a batch together go on together
                        value = float("inf")
            return value

        return sum(self.objective.gathered(compute))

    def _own_loss_and_gradient(self) -> tuple[float, torch.Tensor]:
        parameters = list(self.parameters.values())
        gradient = torch.zeros(self.space.local_size, dtype=self.dtype, device=self.device)
        value = 0.0
        with requiring_grad(self.parameters), self.objective.undisturbed():
            for batch, weight in self.objective.own_batches():
                loss = self.objective.batch_loss(self.objective.outputs(batch), batch)
                value += weight * float(loss.detach())
                if not loss.requires_grad:
                    raise ValueError("the loss depends on no selected parameter: forward or loss detach it or use no_grad")
                parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
                gradient.add_(self._row(parts), alpha=weight)
        return value, gradient

    def anew(self, objective: Objective | None = None) -> Self:
        """The same matrix without what was kept of earlier products, of another objective if one is given."""
        return self._with(list(self.parameters), objective)

    def _with(self, params: Selection, objective: Objective | None = None) -> Self:
        """The same kind of matrix, of other parameters or of another objective."""
        return type(self)(objective or self.objective, params=params)

    def _matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        rows = vectors.T.contiguous()
        now = next(iter(self.parameters.values())).dtype
        if now != self.dtype:
            raise ValueError(f"the parameters are {now} now, the operator {self.dtype}: make a new operator")
        self._check_memory()
        try:
            return self._products(rows).T
        except NoSecondDerivativeError as error:
            warnings.warn(
                f"{str(error).splitlines()[0][:200]}: products by finite differences of first derivatives, with relative "
                "errors of about 1e-3 in float32 and 1e-6 in float64",
                RuntimeWarning,
                stacklevel=4,
            )
            self._source.use_differences()
            return self._products(rows).T

    def _products(self, rows: torch.Tensor) -> torch.Tensor:
        """Products with (K, P) rows; NoSecondDerivativeError where a derivative is missing."""
        return self.objective.total(lambda: self._own_products(rows), rows.shape, self.dtype, NoSecondDerivativeError)

    def _tensors(self, row: torch.Tensor) -> Tensors:
        """A vector, as a tensor for each parameter."""
        return dict(zip(self.parameters, unflatten(row, list(self.parameters.values())), strict=True))

    def _row(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Tensors shaped like the parameters, as a vector."""
        return flatten(tensors)

    def _norm(self, tensors: Sequence[torch.Tensor]) -> float:
        """The norm of tensors shaped like the parameters."""
        return float(self.space.norms(self._row(tensors).unsqueeze(0))[0])

    def _own_products(self, rows: torch.Tensor) -> torch.Tensor:
        products = torch.zeros_like(rows)
        with requiring_grad(self._source.parameters), self.objective.undisturbed(), CheapSecondBackward():
            for batch, weight in self.objective.own_batches():
                multiply = self._multiplier(batch)
                for row, total in zip(rows, products, strict=True):
                    directions = self._tensors(row)
                    try:
                        product = multiply(directions)
                    except (RuntimeError, NotImplementedError) as error:
                        missing = any(words in str(error) for words in _NO_SECOND_DERIVATIVE)
                        if self._source.differences or not missing:
                            raise
                        raise NoSecondDerivativeError(f"no second derivative ({error})") from error
                    total.add_(self._row([product[name] for name in self.parameters]), alpha=weight)
                del multiply
        return products

    def _multiplier(self, batch: Any) -> Multiply:
        """Products for one batch, from the kept graph where there is one that still holds."""
        build = self._difference if self._source.differences else self._differentiate
        if not self.objective.is_one_batch:
            return build(batch, self.parameters)
        tensors = [*self.objective.model.parameters(), *self.objective.model.buffers(), *tensors_of(batch)]
        if isinstance(self.objective.loss, nn.Module):
            tensors += [*self.objective.loss.parameters(), *self.objective.loss.buffers()]
        modules = list(self.objective.model.modules())
        if isinstance(self.objective.loss, nn.Module):
            modules += list(self.objective.loss.modules())
        modes = [_settings(module) for module in modules]
        return self._source.multiplier(lambda: build(batch, self._source.parameters), modes, tensors)

    def _check_memory(self) -> None:
        """Once, before the first product: MemoryError with the batch size that fits, where one batch is too much."""
        if self._source.fits:
            return
        excess = next(filter(None, self.objective.gathered(self._excess)), None)
        if excess:
            raise MemoryError(excess)
        self._source.fits = True

    def _excess(self) -> str:
        """What is wrong with the size of the first batch; empty if nothing is, or if it cannot be measured."""
        if not self.objective.runs_alone:
            return ""
        batch = next(iter(self.objective.batches()), None)
        examples = 0 if batch is None else count_examples(batch)
        tensors = [*self.objective.model.parameters(), *self.objective.model.buffers(), *tensors_of(batch)]
        excluded = {tensor.untyped_storage().data_ptr() for tensor in tensors}

        def measure(size: int) -> int:
            piece = next(iter(split_batch(batch, size)))
            return saved_bytes(lambda: self.objective.outputs(piece), excluded)

        if examples > 2:
            try:
                with requiring_grad(self._source.parameters), self.objective.undisturbed():
                    check_fits(measure, examples, self.device, "use micro_batch={size}, or smaller batches")
            except MemoryError as error:
                return str(error)
            except Exception:  # a model that takes no smaller batch cannot be measured; its own errors come where they belong
                return ""
        return ""


class _Source:
    """Where the products of an operator and its blocks come from: a kept graph of these parameters, or finite differences."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.differences = False
        self.fits = False
        self._multiply: Multiply | None = None
        self._modes: list[dict[str, Any]] = []
        self._seen: list[torch.Tensor] = []
        self._versions: list[int] = []

    def use_differences(self) -> None:
        self.differences, self._multiply = True, None

    def multiplier(self, build: Callable[[], Multiply], modes: list[dict[str, Any]], tensors: list[torch.Tensor]) -> Multiply:
        """What `build` returned for the same modes and the same values of `tensors`, built anew where they changed."""
        if self._multiply is not None and self._holds(modes, tensors):
            return self._multiply
        self._multiply = None  # the old graph is freed before the new one is made
        self._modes, self._seen = modes, [tensor.detach().clone() for tensor in tensors]
        self._versions = _versions(tensors)
        multiply = build()
        if self._holds(modes, tensors):  # a forward pass that changes buffers leaves a graph for one product only
            self._multiply = multiply
        return multiply

    def _holds(self, modes: list[dict[str, Any]], tensors: list[torch.Tensor]) -> bool:
        return (
            modes == self._modes
            and _versions(tensors) == self._versions  # written to since, even if with the same values: autograd refuses
            and all(torch.equal(new, old) for new, old in zip(tensors, self._seen, strict=True))
        )


def _settings(module: nn.Module) -> dict[str, Any]:
    """A module's plain attributes: its mode, a dropout's probability, a loss's label smoothing."""
    return {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str | tuple)}


def _versions(tensors: list[torch.Tensor]) -> list[int]:
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def central_difference(
    evaluate: Callable[[], list[torch.Tensor]],
    parameters: Mapping[str, nn.Parameter],
    directions: Tensors,
    norm: Callable[[Sequence[torch.Tensor]], float] | None = None,
) -> list[torch.Tensor]:
    r"""The derivative of `evaluate` in a direction of the parameters, by `central_differences`.

    The step is shortened until two results in a row agree, or until rounding lets them part again; the one before that counts.
    """
    norm = norm or _norm
    root = torch.finfo(next(iter(directions.values())).dtype).eps ** (1 / 3)
    best, least = [torch.zeros(())], float("inf")
    previous: list[torch.Tensor] | None = None
    with contextlib.closing(central_differences(evaluate, parameters, directions, norm)) as results:
        for found in results:
            if previous is None:
                best = found
            else:
                whole = norm(found)
                change = norm([new - old for new, old in zip(found, previous, strict=True)]) / whole if whole else 0.0
                if change < least:
                    best, least = found, change
                if change <= _AGREEMENT * root or change > 2 * least:
                    break
            previous = found
    return best


def central_differences(
    evaluate: Callable[[], list[torch.Tensor]],
    parameters: Mapping[str, nn.Parameter],
    directions: Tensors,
    norm: Callable[[Sequence[torch.Tensor]], float] | None = None,
) -> Generator[list[torch.Tensor], None, None]:
    r"""Central differences of `evaluate` over shorter and shorter steps in a direction of the parameters.

    .. math:: \frac{f(\theta + h v) - f(\theta - h v)}{2 h}, \qquad
              h = 4^{-k} \epsilon^{1/3} \max(\|\theta\|, 1) / \|v\|, \quad k = 0, 1, \dots

    with the precision's epsilon: the step in parameter space depends neither on the direction's length nor, relatively, on
    the parameters' (Nocedal & Wright, section 8.1). The parameters come back bit by bit when the generator is closed. norm: of
    tensors taken together, where processes hold parts of them.
    """
    norm = norm or _norm
    moved = {name: parameters[name] for name in directions}
    length = norm(list(directions.values()))
    if length == 0:
        yield [torch.zeros_like(tensor) for tensor in evaluate()]
        return
    size = norm([parameter.detach() for parameter in moved.values()])
    step = torch.finfo(next(iter(moved.values())).dtype).eps ** (1 / 3) * max(size, 1.0) / length
    originals = {name: parameter.detach().clone() for name, parameter in moved.items()}
    try:
        for _ in range(_SHORTEST_STEP):
            yield _difference_at(step, evaluate, moved, originals, directions)
            step /= 4
    finally:
        with torch.no_grad():
            for name, parameter in moved.items():
                parameter.copy_(originals[name])


def _difference_at(
    step: float, evaluate: Callable[[], list[torch.Tensor]], moved: Mapping[str, nn.Parameter], originals: Tensors, by: Tensors
) -> list[torch.Tensor]:
    results = []
    for signed in (step, -step):
        with torch.no_grad():
            for name, parameter in moved.items():
                parameter.copy_(originals[name] + signed * by[name])
        results.append([tensor.detach() for tensor in evaluate()])
    return [(above - below) / (2 * step) for above, below in zip(*results, strict=True)]


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    """The Euclidean norm of tensors taken together."""
    return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())


def as_objective(
    model: nn.Module | Objective, loss: LossFunction | None, data: Data | None, micro_batch: int | None = None
) -> Objective:
    """The Objective that a public function was called with, in either form."""
    if isinstance(model, Objective):
        if loss is not None or data is not None or micro_batch is not None:
            raise TypeError("pass either an Objective or a model with its loss and data, not both")
        return model
    if loss is None or data is None:
        raise TypeError("a loss and data are needed beside the model")
    return Objective(model, loss, data, micro_batch=micro_batch)
