"""AdaHessian: Adam with the curvature's moment in place of the gradient's."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.optimizer import ParamsT

from hessian.operators.base import LinearOperator
from parallel.optimizers.diagonal_estimate import estimated_diagonal, parameters_of
from parallel.optimizers.moments import corrected_squares, mean_gradient, take_in_squares
from parallel.optimizers.partwise import PartwiseOptimizer, Trained, own_part, slot


class AdaHessian(PartwiseOptimizer):
    r"""Steps divided by the root mean square of the Hessian's diagonal.

    .. math::
        D &= \big| \operatorname{mean}_k z_k \odot H z_k \big|, \qquad z_{ki} = \pm 1,
            \qquad \text{averaged over the positions of each kernel} \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) D^2, \qquad m \leftarrow \beta_1 m + (1 - \beta_1) g \\
        w &\leftarrow w - \gamma \left( \frac{m / (1 - \beta_1^t)}{(v / (1 - \beta_2^n))^{k/2} + \epsilon} + \lambda w \right)

    with t steps and n estimates so far. `observe` shows it the Hessian, before `step`; H z is that of all ranks' data.

    Blocks: weights of three dimensions or more are taken for convolutions, and :math:`|\cdot|` is averaged over all but the
    first two dimensions, so that every pair of channels has one value (the paper's equation averages D with its signs, which
    can cancel and make the step of a whole kernel long); other parameters' entries stay by themselves, a block size of 1. Turn
    it off with `spatial_average=False`, of a group, for parameters of another kind.

    Delayed curvature: `needs_curvature` is true every `curvature_every` steps. Between estimates v stays as it is, and n counts
    estimates, not steps: that estimates all have their weight once keeps the sampling noise of v what it is without a delay
    (an estimate taken in again each step would weigh as one of beta_2 to the power of the delay), and D need not be kept.

    lr: :math:`\gamma`. hessian_power: k. weight_decay: :math:`\lambda`, decoupled. samples: products an estimate takes. Raises
    ValueError for any of them out of its range. samples and curvature_every are no part of `state_dict`.

    Source: Yao et al., ADAHESSIAN: an adaptive second order optimizer for machine learning (AAAI 2021), algorithm 1.
    """

    slots = ("step", "exp_avg", "estimates", "exp_hessian_diagonal_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.15,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        hessian_power: float = 1.0,
        spatial_average: bool = True,
        samples: int = 1,
        curvature_every: int = 1,
    ) -> None:
        for name, value in (("samples", samples), ("curvature_every", curvature_every)):
            if value < 1:
                raise ValueError(f"{name}={value}: give a number of at least 1")
        self.samples, self.curvature_every = samples, curvature_every
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_power": hessian_power,
            "spatial_average": spatial_average,
        }
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"samples": self.samples, "curvature_every": self.curvature_every}

    def needs_curvature(self) -> bool:
        """Whether the coming step is to be preceded by `observe`."""
        trained = [parameter for group in self.param_groups for parameter in group["params"] if parameter.requires_grad]
        if not all(self.state.get(parameter, {}).get("estimates") for parameter in trained):
            return True
        return max(int(state.get("step", 0)) for state in self.state.values()) % self.curvature_every == 0

    @torch.no_grad()
    def observe(self, operator: LinearOperator, generator: torch.Generator | None = None) -> None:
        """Take in the curvature of the coming step.

        operator: the Hessian (or a Gauss-Newton matrix) in at least the parameters that require a gradient, of all ranks' data.
        Its parameters are found as the same objects or, where they are copies as for FSDP2, by the names that the optimizer
        was given (`model.named_parameters()`). generator: of the signs, the same on all ranks. Collective where the operator
        is.

        Raises ValueError for a parameter that the operator does not have, TypeError for an operator of no parameters, and
        ArithmeticError for curvature that is not finite; the optimizer is then as it was.
        """
        matched = self._matched(parameters_of(operator))
        diagonal = estimated_diagonal(operator, self.samples, generator)
        states = [self.state[parameter] for _, parameter, _ in matched]
        squares = slot([parameter for _, parameter, _ in matched], states, "exp_hessian_diagonal_sq")
        magnitudes = [_magnitude(diagonal[name], parameter, group["spatial_average"]) for name, parameter, group in matched]
        take_in_squares(squares, magnitudes, [group["betas"][1] for _, _, group in matched])
        for state in states:
            state["estimates"] = int(state.get("estimates", 0)) + 1

    def _matched(self, parameters: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor, dict[str, Any]]]:
        """Every parameter that requires a gradient, with its name in the operator and its group."""
        same = {id(parameter): name for name, parameter in parameters.items()}
        found = []
        for group in self.param_groups:
            names = group.get("param_names", [None] * len(group["params"]))
            for index, (own_name, parameter) in enumerate(zip(names, group["params"], strict=True)):
                if not parameter.requires_grad:
                    continue
                name = same.get(id(parameter), own_name)
                if name not in parameters or parameters[name].shape != parameter.shape:
                    called = repr(own_name) if own_name else f"{index} of a group, of shape {tuple(parameter.shape)},"
                    raise ValueError(
                        f"the operator does not have the parameter {called} that this optimizer trains: make it of the same "
                        "model with params=None, and the optimizer of model.named_parameters()"
                    )
                found.append((name, parameter, group))
        return found

    def _update(self, trained: Trained) -> None:
        rates = trained.of("lr")
        moves = [index for index, rate in enumerate(rates) if rate]  # torch makes an optimizer's state by a step of rate 0
        if not all(trained.states[index].get("estimates") for index in moves):
            raise RuntimeError(
                "there is no curvature yet: call observe(hessian.Hessian(model, loss, batch)), or with what "
                "parallel.curvature.hessian returns, before step() whenever needs_curvature()"
            )
        for state in trained.states:
            state.setdefault("estimates", 0)
        estimates = [max(int(state["estimates"]), 1) for state in trained.states]
        betas = [group["betas"][1] for group in trained.groups]
        scales = corrected_squares(trained.slot("exp_hessian_diagonal_sq"), betas, estimates)
        torch._foreach_pow_(scales, [power / 2 for power in trained.of("hessian_power")])
        torch._foreach_add_(scales, trained.of("eps"))
        directions = mean_gradient(trained, trained.count())
        torch._foreach_div_(directions, scales)
        torch._foreach_add_(directions, torch._foreach_mul(trained.weights, trained.of("weight_decay")))
        torch._foreach_mul_(directions, rates)
        torch._foreach_sub_(trained.weights, directions)


def _magnitude(diagonal: torch.Tensor, parameter: torch.Tensor, spatial_average: bool) -> torch.Tensor:
    """This rank's part of a whole parameter's curvature without its sign, over blocks."""
    magnitude = diagonal.abs()
    if spatial_average and magnitude.dim() > 2:
        magnitude = magnitude.mean(tuple(range(2, magnitude.dim())), keepdim=True).expand_as(magnitude).contiguous()
    if isinstance(parameter, DTensor):
        return own_part(distribute_tensor(magnitude, parameter.device_mesh, parameter.placements, src_data_rank=None))
    return magnitude
