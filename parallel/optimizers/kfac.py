r"""K-FAC: natural gradients by Kronecker factors of each layer's Fisher matrix, divided among the ranks that train."""

from collections.abc import Callable, Iterable
from math import sqrt
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from parallel.optimizers.by_parameter import own_part
from parallel.optimizers.layer_factors import Layer, Recorder, covered_layers
from parallel.replica import local_part

_FACTORS = ("input_factor", "output_factor")
_INVERSES = ("input_inverse", "output_inverse")


class KFAC(torch.optim.Optimizer):
    r"""Momentum SGD on gradients preconditioned by each layer's Kronecker-factored empirical Fisher matrix.

    .. math:: V = \nu\, (G + \tfrac{\sqrt\lambda}{\pi} I)^{-1}\, \nabla_W L\, (A + \pi \sqrt\lambda I)^{-1}, \qquad
              A = \tfrac{1}{|R|} \sum_{(n,p) \in R} a_{np} a_{np}^\top, \quad G = \tfrac{1}{N} \sum_{n,p} g_{np} g_{np}^\top,

    with the layer's inputs a (a convolution's patches) at the positions p of the N items n, a 1 appended for the bias, and g
    the gradients of the items' own losses in its outputs, as the training passes bring them along (the targets are the
    data's, not drawn from the model); :math:`\pi = \sqrt{(\mathrm{tr} A / \dim A) / (\mathrm{tr} G / \dim G)}`. The step
    shrinks where it would go too far in the metric itself: :math:`\nu = \min(1, \sqrt{\kappa / \sum \eta^2 V^\top \nabla L})`
    with the learning rate :math:`\eta`. A and G are exponential averages over the steps in which they are due.

    Linear layers of any leading dimensions, convolutions of one group, and embeddings (A: their tokens' frequencies) have
    factors. All other parameters - norms, grouped convolutions, weights used by several modules, layers that no pass has
    reached - take plain momentum SGD steps at the same learning rate.

    Factors come from hooks on `model`, which stay until `remove_hooks`: they read the passes (any number of them) in training
    mode whose step `needs_curvature()`. A pass's loss must be the mean over the examples that the model was called with;
    where it is not, `weigh` says before the pass what it is. `zero_grad` or `step` begins a new step: backward passes of
    others, such as an operator's products, must come before it.

    Several ranks share the work: gradients are those of the whole batch already (DDP, FSDP2), the factors' sums are added up
    by one all-reduce whatever each rank's share, each layer is inverted on one rank and broadcast. Steps are the same on all.
    `state[weight]` has "input_factor", "output_factor", "input_inverse" and "output_inverse", whole on every rank, every
    parameter its "momentum_buffer", the first of all the "step".

    params: parameters or groups of them (default: all of the model that require a gradient). lr: as for SGD. weight_decay:
    times the weights is added to V. damping: :math:`\lambda`, in units of curvature. factor_decay: of the averages, a factor
    step. factor_every, inverse_every: steps. clip: :math:`\kappa`, None for :math:`\nu = 1`. group: the ranks that share the
    batch (default: all, if torch.distributed is initialized).

    ValueError for numbers out of range, and for a model of which layers are divided among ranks other than by FSDP2. `step`
    raises RuntimeError while no layer has factors, ArithmeticError where a factor has no inverse.

    Source: Martens & Grosse, 2015 (arXiv:1503.05671; damping: section 6.3); Grosse & Martens, 2016 (arXiv:1602.01407); Osawa et
    al., 2019 (arXiv:1811.12019); Pauloski et al., 2020 (arXiv:2007.00784); nu: Ba, Grosse & Martens, 2017 (ICLR).
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 0.02,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: float = 1e-3,
        factor_decay: float = 0.95,
        factor_every: int = 10,
        inverse_every: int = 100,
        clip: float | None = 1e-3,
        group: ProcessGroup | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name}={value}: give a number of at least 0")
        for name, value in (("damping", damping), *([("clip", clip)] if clip is not None else [])):
            if not value > 0:
                raise ValueError(f"{name}={value}: give a positive number")
        for name, value in (("momentum", momentum), ("factor_decay", factor_decay)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value}: give a number from 0 to below 1")
        for name, count in (("factor_every", factor_every), ("inverse_every", inverse_every)):
            if count < 1:
                raise ValueError(f"{name}={count}: give a number of steps, at least 1")
        chosen = [one for one in model.parameters() if one.requires_grad] if params is None else params
        super().__init__(chosen, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.damping, self.factor_decay, self.clip = damping, factor_decay, clip
        self.factor_every, self.inverse_every = factor_every, inverse_every
        self._group = group
        self._ranks = distributed.get_world_size(group) if distributed.is_initialized() else 1
        self.layers = covered_layers(model, [one for group in self.param_groups for one in group["params"]])
        self._recorder = Recorder(model, self.layers, self.needs_curvature)

    def needs_curvature(self) -> bool:
        """Whether the passes of the coming step bring factors: they must then be in training mode."""
        return self._steps_taken % self.factor_every == 0

    def weigh(self, items: float, divisor: float) -> None:
        """Of this rank's passes to come: their loss is the sum of the losses of `items` items over `divisor`.

        A mean that was multiplied by 1 / k for k accumulated passes has a divisor of k times its items, and so on. Inputs count
        in A whether their targets do (items) or not.
        """
        self._recorder.weigh(items, divisor)

    @property
    def factor_bytes(self) -> int:
        """At most, of all layers' factors and inverses, which `state_dict` holds whole."""
        return sum(4 * layer.packed_size * layer.dtype.itemsize for layer in self.layers)

    def remove_hooks(self) -> None:
        """Leave the model as it was before; the factors stay as they are."""
        self._recorder.remove()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients and what the passes since the last step brought."""
        super().zero_grad(set_to_none)
        self._forget()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; collective. closure: computes gradients and a loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._gather_restored()
        taken = self._steps_taken
        if self.needs_curvature():
            self._update_factors()
        with_factors = [layer for layer in self.layers if _FACTORS[0] in self.state[layer.weight]]
        if self.layers and not with_factors:
            raise RuntimeError(
                "no layer has factors: pass the batch through the model, in training mode and with gradients, before step()"
            )
        if taken % self.inverse_every == 0 or any(_INVERSES[0] not in self.state[layer.weight] for layer in with_factors):
            self._update_inverses(with_factors)
        self._descend(self._preconditioned(with_factors))
        self._forget()
        self.state[self._first]["step"] = torch.tensor(float(taken + 1))
        return loss

    @property
    def _first(self) -> torch.Tensor:
        first: torch.Tensor = self.param_groups[0]["params"][0]
        return first

    @property
    def _steps_taken(self) -> int:
        return int(self.state[self._first].get("step", 0))

    def _forget(self) -> None:
        self._recorder.forget()
        for layer in self.layers:
            layer.clear()

    def _gather_restored(self) -> None:
        """Factors in parts, as a checkpoint can return one that has its parameter's shape, whole again."""
        for layer in self.layers:
            state = self.state[layer.weight]
            for slot in (*_FACTORS, *_INVERSES):
                if isinstance(state.get(slot), DTensor):
                    state[slot] = state[slot].full_tensor()

    def _update_factors(self) -> None:
        if not self.layers:
            return
        sums = [layer.packed_sums() for layer in self.layers]
        flat = torch.cat(sums)
        if self._ranks > 1:
            distributed.all_reduce(flat, group=self._group)
        for layer, packed in zip(self.layers, flat.split([len(one) for one in sums]), strict=True):
            means = layer.unpack_means(packed)
            state = self.state[layer.weight]
            for slot, mean in zip(_FACTORS, means or (), strict=means is not None):
                state[slot] = state[slot].lerp(mean, 1 - self.factor_decay) if slot in state else mean

    def _update_inverses(self, layers: list[Layer]) -> None:
        """Each rank inverts the factors of its layers and broadcasts them as one message."""
        rank = distributed.get_rank(self._group) if self._ranks > 1 else 0
        widest = max((layer.dtype for layer in layers), key=lambda dtype: dtype.itemsize, default=torch.float32)
        messages: list[tuple[Layer, torch.Tensor]] = []
        works = []
        for source, dealt in enumerate(_dealt(layers, self._ranks)):
            message = torch.empty(sum(one.packed_size for one in dealt), dtype=widest, device=self._first.device)
            pieces = message.split([layer.packed_size for layer in dealt])
            if source == rank:
                for layer, packed in zip(dealt, pieces, strict=True):
                    packed.copy_(layer.pack(*self._inverted(layer)))
            if self._ranks > 1 and dealt:
                works.append(distributed.broadcast(message, group=self._group, group_src=source, async_op=True))
            messages += zip(dealt, pieces, strict=True)
        for work in works:
            if work is not None:
                work.wait()
        for layer, packed in messages:
            if not bool(torch.isfinite(packed).all()):
                raise ArithmeticError(
                    f"the factors of {layer.name!r} have no finite inverse: give more than damping={self.damping:g}"
                )
            self.state[layer.weight].update(zip(_INVERSES, layer.unpack(packed.to(layer.dtype)), strict=True))

    def _inverted(self, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, outputs = (self.state[layer.weight][slot] for slot in _FACTORS)
        trace = float(inputs.sum() if layer.is_embedding else inputs.trace())
        sizes = trace / layer.input_size, float(outputs.trace()) / layer.output_size
        pi = sqrt(sizes[0] / sizes[1]) if min(sizes) > 0 else 1.0  # without a scale of its own, a factor takes half of it
        of_inputs, of_outputs = pi * sqrt(self.damping), sqrt(self.damping) / pi
        inverse = 1 / (inputs + of_inputs) if layer.is_embedding else _inverse(inputs, of_inputs)
        return inverse, _inverse(outputs, of_outputs)

    def _preconditioned(self, layers: list[Layer]) -> dict[torch.Tensor, torch.Tensor]:
        """What takes the gradients' place, whole tensors by parameter."""
        rates = {one: float(group["lr"]) for group in self.param_groups for one in group["params"]}
        found: dict[torch.Tensor, torch.Tensor] = {}
        lengths = []
        for layer in layers:
            parameters = [one for one in (layer.weight, layer.bias) if one is not None]
            if any(one.grad is None for one in parameters):
                continue
            gradients = [_whole(one.grad).to(layer.dtype) for one in parameters]
            inputs, outputs = (self.state[layer.weight][slot] for slot in _INVERSES)
            if layer.is_embedding:
                directions = [inputs.unsqueeze(1) * gradients[0] @ outputs]
            else:
                columns = [gradient.reshape(layer.output_size, -1) for gradient in gradients]
                product = outputs @ torch.cat(columns, dim=1) @ inputs
                widths = [column.shape[1] for column in columns]
                directions = [piece.reshape(one.shape) for piece, one in zip(product.split(widths, 1), gradients, strict=True)]
            for one, direction, gradient in zip(parameters, directions, gradients, strict=True):
                found[one] = direction
                lengths.append(rates[one] ** 2 * (direction * gradient).sum())
        if self.clip is not None and found:
            length = float(torch.stack(lengths).double().sum())
            scale = min(1.0, sqrt(self.clip / length)) if length > 0 else 1.0
            torch._foreach_mul_(list(found.values()), scale)
        return found

    def _descend(self, directions: dict[torch.Tensor, torch.Tensor]) -> None:
        """One step of momentum SGD along the directions, and along the gradient of a parameter that has none."""
        for group in self.param_groups:
            moved = [one for one in group["params"] if one.grad is not None]
            if not moved:
                continue
            updates = [own_part(directions[one], one) if one in directions else local_part(one.grad) for one in moved]
            own = [local_part(one) for one in moved]
            if group["weight_decay"]:
                updates = list(torch._foreach_add(updates, own, alpha=group["weight_decay"]))
            if group["momentum"]:
                fresh = [one for one in moved if "momentum_buffer" not in self.state[one]]
                for one in fresh:
                    self.state[one]["momentum_buffer"] = torch.zeros_like(one)
                buffers = [local_part(self.state[one]["momentum_buffer"]) for one in moved]
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, updates)
                updates = buffers
            torch._foreach_add_(own, updates, alpha=-float(group["lr"]))


def _dealt(layers: list[Layer], ranks: int) -> list[list[Layer]]:
    """The layers that each rank inverts: the dearest first, each to the rank with the least to do."""
    costs = {layer: (0 if layer.is_embedding else layer.input_size**3) + layer.output_size**3 for layer in layers}
    hands: list[list[Layer]] = [[] for _ in range(ranks)]
    for layer in sorted(layers, key=lambda one: -costs[one]):
        min(hands, key=lambda hand: sum(costs[one] for one in hand)).append(layer)
    return hands


def _inverse(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    """Of a symmetric positive semi-definite matrix plus `damping` times the identity, by Cholesky; NaN if it has none."""
    damped = matrix.to(torch.float64, copy=True)
    damped.diagonal().add_(damping)
    root, failed = torch.linalg.cholesky_ex(damped)
    # on one rank of many an error would leave the others waiting
    return torch.where(failed != 0, torch.nan, torch.cholesky_inverse(root)).to(matrix.dtype)


def _whole(tensor: Any) -> torch.Tensor:
    whole: torch.Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole
