r"""Learning rates of layers from the curvature of the loss, while it is trained.

Gradient descent of rate :math:`\eta` is stable while :math:`\lambda_{\max}(H) < 2 / \eta`; with heavy-ball momentum m, while
:math:`\lambda_{\max} < 2 (1 + m) / \eta`; with Adam's average of gradients, for the Hessian preconditioned as Adam's steps are,
while :math:`\lambda_{\max}(P^{-1/2} H P^{-1/2}) < 2 (1 + \beta_1) / ((1 - \beta_1) \eta)` (Cohen et al. 2021, appendix B; 2022,
section 2). With a rate :math:`\eta \tau_l` for layer l, the matrix is :math:`T^{1/2} P^{-1/2} H P^{-1/2} T^{1/2}`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hessian.operators.curvature import CurvatureOperator
from hessian.results import LayerReport

_SAFETY = 0.5  # of the stable rate: the curvature is of few examples, and some steps old
_FIRST_PRODUCTS = 3
_MEMORY = 0.25  # of what was measured before, in the largest eigenvalue of all
_LAYER_MEMORY = 0.8  # in those of layers, once as many have been averaged: other layers' part is to average out
_RISE = 1.5  # of the measured examples' loss over its average: more is taken for a step that was too long
_LOSS_MEMORY = 0.5
_FLOOR = 1e-4  # of the largest layer's curvature: less, or negative curvature, counts as this much
_TINY = 1e-30


def layer_of(parameter: str) -> str:
    """A layer's name: that of the module whose parameter it is."""
    return parameter.rpartition(".")[0]


def relative_rates(curvatures: Mapping[str, float], sizes: Mapping[str, int], ratio: float) -> dict[str, float]:
    """Rates in proportion to 1 / curvature, their geometric mean over all weights being 1, none further than `ratio` from it.

    curvatures: by layer, of any sign; sizes: the weights of each.
    """
    if ratio < 1:
        raise ValueError(f"a ratio of {ratio} to the base rate: give at least 1")
    least = _FLOOR * max(max(curvatures.values()), _TINY)
    logs = {name: math.log(max(value, least)) for name, value in curvatures.items()}
    mean = sum(sizes[name] * one for name, one in logs.items()) / sum(sizes.values())
    return {name: min(max(math.exp(mean - one), 1 / ratio), ratio) for name, one in logs.items()}


def reported_rates(report: LayerReport, parameters: Mapping[str, torch.Tensor], ratio: float) -> dict[str, float]:
    """`relative_rates` by layer, from the top eigenvalues in a report of `hessian.layer_report`.

    ValueError for a report without them, or without one of the parameters.
    """
    curvatures: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for name, parameter in parameters.items():
        if name not in report:
            raise ValueError(f"the layer report has no parameter {name!r}: it is of another network")
        eigenvalue = report[name].top_eigenvalue
        if eigenvalue is None:
            raise ValueError("the layer report has no eigenvalues: make it with eigenvalues=True")
        layer = layer_of(name)
        curvatures[layer] = max(curvatures.get(layer, -math.inf), eigenvalue)
        sizes[layer] = sizes.get(layer, 0) + parameter.numel()
    return relative_rates(curvatures, sizes, ratio)


def stability_threshold(optimizer: torch.optim.Optimizer) -> float:
    """The rate times the largest eigenvalue at which steps become unstable; ValueError for an optimizer without a known one.

    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> stability_threshold(torch.optim.SGD([weight], lr=0.1, momentum=0.9))
    3.8
    """
    defaults = optimizer.defaults
    if isinstance(optimizer, torch.optim.SGD):
        return 2 * (1 + float(defaults["momentum"]))
    if isinstance(optimizer, torch.optim.AdamW | torch.optim.Adam):
        first = float(defaults["betas"][0])
        return 2 * (1 + first) / (1 - first)
    raise ValueError(f"rates from curvature are known for sgd and adamw, not for {type(optimizer).__name__}")


class CurvatureRates:
    r"""The rates of layers, from products with the Hessian of a few examples every some steps.

    Of each layer's block the eigenvalue of largest magnitude is followed by a power iteration that all layers share: a product
    with the blocks' vectors under random signs s gives, for layer l, :math:`s_l (H z)_l = H_{ll} v_l + \sum_{k \ne l} s_l s_k
    H_{lk} v_k`, whose second part has mean zero. Another power iteration follows the largest eigenvalue of the whole matrix
    under the rates that these give, which the safe rate is taken from: layers that are stable one by one need not be together.
    Where the examples' loss has risen well above its average, the safe rate is halved, whatever the curvature says.

    ratio: by how much a layer's rate may differ from the others', and how far the safe rate may lie above the base rate.
    Vectors are whole on every rank, and the same.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], threshold: float, *, ratio: float = 10.0) -> None:
        self.threshold, self.ratio = threshold, ratio
        self.layers = list(dict.fromkeys(layer_of(name) for name in parameters))
        self.sizes = dict.fromkeys(self.layers, 0)
        numbers = []
        for name, parameter in parameters.items():
            self.sizes[layer_of(name)] += parameter.numel()
            numbers.append(torch.full((parameter.numel(),), self.layers.index(layer_of(name))))
        self._layer = torch.cat(numbers)
        self.blocks: torch.Tensor | None = None  # (P,): each layer's part points along its eigenvector
        self.whole: torch.Tensor | None = None  # (P,)
        self.curvatures = dict.fromkeys(self.layers, 0.0)
        self.largest = 0.0
        self._loss: float | None = None
        self._averaged = self._updates = 0

    @property
    def is_measured(self) -> bool:
        """Whether there was an `update`."""
        return self._updates > 0

    @property
    def relative(self) -> dict[str, float]:
        """Each layer's rate over the safe rate, by how strongly it curves the loss, whether up or down."""
        return relative_rates({name: abs(value) for name, value in self.curvatures.items()}, self.sizes, self.ratio)

    @property
    def safe_rate(self) -> float:
        """Half of what is stable; infinite where there is no positive curvature."""
        return _SAFETY * self.threshold / self.largest if self.largest > 0 else math.inf

    def rates(self, base_rate: float) -> dict[str, float]:
        """Each layer's rate: the safe one times the layer's own factor, but no more than `ratio` times the base rate."""
        return {name: min(self.safe_rate * factor, self.ratio * base_rate) for name, factor in self.relative.items()}

    def update(
        self,
        operator: CurvatureOperator,
        preconditioner: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Measure with one or two products of `operator`, of the parameters in their order, at first six: layers are followed
        every other time. Collective.

        preconditioner: (P,), the diagonal of P. ArithmeticError where a product is not finite.
        """
        root = None if preconditioner is None else preconditioner.clamp(min=_TINY).rsqrt()
        first = self.blocks is None
        if self.blocks is None or self.whole is None:
            self.blocks, self.whole = operator.space.whole(operator.space.random(2, "normal", generator))
        for _ in range(_FIRST_PRODUCTS if first else self._updates % 2):
            self._follow_blocks(operator, root, generator)
        self._updates += 1
        factors = torch.tensor([self.relative[name] for name in self.layers])[self._layer.cpu()].sqrt().to(self.whole)
        scale = factors if root is None else factors * root
        for _ in range(_FIRST_PRODUCTS if first else 1):
            product = scale * self._product(operator, scale * self.whole / self.whole.norm())
            length = float(product.norm())
            self.whole = product if length > 0 else torch.ones_like(product)
        if self._has_risen(operator.loss_value()):
            length = max(length, 2 * self.largest)
        rose = length > self.largest  # believed at once: a step that is too long cannot be taken back
        self.largest = length if rose else _MEMORY * self.largest + (1 - _MEMORY) * length

    def _has_risen(self, loss: float) -> bool:
        """Whether the examples' loss is well above its average. A loss that saturates has hardly any curvature left."""
        before = loss if self._loss is None else self._loss
        self._loss = _LOSS_MEMORY * before + (1 - _LOSS_MEMORY) * loss
        return loss > _RISE * before > 0

    def _follow_blocks(self, operator: CurvatureOperator, root: torch.Tensor | None, generator: torch.Generator | None) -> None:
        assert self.blocks is not None
        device = self.blocks.device
        layer, count = self._layer.to(device), len(self.layers)
        signs = torch.randint(0, 2, (count,), generator=generator).mul(2).sub(1).to(self.blocks)[layer]
        lengths = _sums(self.blocks.square(), layer, count).sqrt().clamp(min=_TINY)
        vectors = self.blocks / lengths[layer]
        product = signs * self._product(operator, signs * vectors if root is None else root * signs * vectors)
        product = product if root is None else root * product
        found = _sums(vectors * product, layer, count)
        known = torch.tensor([self.curvatures[name] for name in self.layers]).to(found)
        self._averaged += 1
        memory = min(_LAYER_MEMORY, 1 - 1 / self._averaged)
        now = memory * known + (1 - memory) * found
        self.curvatures = dict(zip(self.layers, now.tolist(), strict=True))
        self.blocks = memory * now[layer] * vectors + (1 - memory) * product

    def _product(self, operator: CurvatureOperator, vector: torch.Tensor) -> torch.Tensor:
        space = operator.space
        product: torch.Tensor = space.whole(operator.rows(space.part(vector.unsqueeze(0))))[0]
        if not product.isfinite().all():
            raise ArithmeticError("the curvature is not finite")
        return product

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, but for the vectors `blocks` and `whole`."""
        counts = {"averaged": self._averaged, "updates": self._updates}
        return {"curvatures": self.curvatures, "largest": self.largest, "loss": self._loss} | counts

    def load(self, state: Mapping[str, Any], blocks: torch.Tensor, whole: torch.Tensor) -> None:
        """Go on from a checkpoint."""
        self.curvatures, self.largest, self._loss = dict(state["curvatures"]), state["largest"], state["loss"]
        self._averaged, self._updates = state["averaged"], state["updates"]
        self.blocks, self.whole = blocks, whole


def _sums(values: torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
    return values.new_zeros(count).index_add_(0, index, values)


def scaled_rate(rate: float, batch_size: int, base_batch: int | None, rule: str) -> float:
    """A base rate that was chosen for `base_batch`, for another batch.

    rule: "linear", times the ratio of the two (Goyal et al. 2017); "sqrt", times its square root; "legw", as that, with a
    longer warm-up (You et al. 2019; see `scaled_warmup`); "none", as it is.

    >>> scaled_rate(0.1, 256, base_batch=64, rule="linear"), scaled_rate(0.1, 256, base_batch=64, rule="sqrt")
    (0.4, 0.2)
    """
    if base_batch is None or rule == "none":
        return rate
    ratio = batch_size / base_batch
    return rate * (ratio if rule == "linear" else math.sqrt(ratio))


def scaled_warmup(warmup: float, batch_size: int, base_batch: int | None, rule: str) -> float:
    """The share of a run that warms up: for "legw" as many times longer as the batch is larger, at most half of the run."""
    if base_batch is None or rule != "legw":
        return warmup
    return min(warmup * batch_size / base_batch, 0.5)


RULES: Sequence[str] = ("linear", "sqrt", "legw", "none")
