"""Quantization-aware fine-tuning: latent weights and learned steps, taught by the task's loss and by the float network."""

import io
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import length_hint
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F
from tqdm.auto import tqdm

from hawq.fake_quantize import TrainableLayer, TrainableQuantizer, baked, trainable, trainable_layer
from hawq.graph import find_layers, get_tensor
from hawq.layers import LAYERS
from hawq.model import QuantizedModel
from hawq.stages import model_digest
from hessian.batch import count_examples, tensors_of
from hessian.files import read_checked, write_checked
from hessian.objective import Data, LossFunction, Objective
from hessian.torch_losses import is_classification

logger = logging.getLogger(__name__)

_MAX_HALVINGS = 8  # of the learning rate, until the training is given up
_STAGED_SHARE = 0.5  # of the epochs, in which an `order` is gone through


def finetune(
    model: QuantizedModel,
    float_graph: fx.GraphModule,
    train_batches: Data,
    loss: LossFunction,
    *,
    epochs: int,
    learning_rate: float = 0.005,
    distillation: float = 1.0,
    order: Sequence[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> QuantizedModel:
    r"""A copy of `model` trained at its widths: new codes, steps (of activations too), biases and float parameters.

    .. math:: \min_{w, s, b} \; \ell(f(x), y) + \text{distillation} \cdot D(f(x), f_{\text{float}}(x))

    by Adam with a cosine schedule, rounding straight-through with LSQ's gradients. D is KL(float || quantized) for
    torch's classification losses, the squared error of the outputs for others.

    float_graph: the folded float network that `model` was made of (`hawq.fold.folded`). train_batches: as for `hessian`;
    an epoch is one pass, in the order in which they come. learning_rate: in units of each channel's first step (of a
    bias: of its layer's mean weight norm; of a float parameter: of its root mean square). order: layers in the order in
    which they start to be rounded, over the first half of the epochs (see `hawq_v1_order`); None: all from the start.

    checkpoint: a file written after each epoch; where it exists, training continues from it bit for bit. generator: what
    `train_batches` draws its order from (None: the global one); its state is kept in the checkpoint.

    A loss that is not finite takes training back to the last epoch's end and halves the learning rate, which is logged.
    Raises ValueError if that does not help, for a float graph, order or checkpoint that does not belong to `model`, and
    for data that are not finite or out of range.

    Source: Esser et al., Learned Step Size Quantization, ICLR 2020; Hinton et al. 2015 (at temperature 1).
    """
    _check(model, float_graph, epochs, learning_rate, distillation, order)
    key = {
        "network": str(model.graph),
        "quantized weights": model_digest(model),
        "float weights": model_digest(float_graph),
        "widths": [sorted(model.bits.items()), model.activation_bits],
        "settings": [epochs, learning_rate, distillation, None if order is None else list(order)],
    }
    twin = trainable(model, float_graph, from_float=order is not None)
    teacher = Objective(float_graph, loss, train_batches)
    training = _Training(twin, teacher, epochs, learning_rate, distillation, order, generator, key)
    content = None if checkpoint is None else read_checked(checkpoint)
    if content is not None:
        training.restore(content, str(checkpoint))
        logger.info("fine-tuning continues after epoch %d of %d", training.epoch, epochs)
    good = training.snapshot()
    with tqdm(desc="fine-tuning", total=epochs, initial=training.epoch, unit="epoch", disable=not progress) as bar:
        while training.epoch < epochs:
            try:
                bar.set_postfix(loss=f"{training.run_epoch():.4g}")
            except _DivergedError:
                training.roll_back(good)
                continue
            good = training.snapshot()
            if checkpoint is not None:
                write_checked(checkpoint, good)
            bar.update()
    return baked(twin, model)


def hawq_v1_order(model: QuantizedModel, float_graph: fx.GraphModule, eigenvalues: Mapping[str, float]) -> list[str]:
    """The layers of `model` by descending lambda_i |Q(W_i) - W_i|^2, lambda_i being the largest eigenvalue of the Hessian
    in layer i's weights.

    Raises ValueError for a layer without an eigenvalue. Source: Dong et al., HAWQ, ICCV 2019, section 3.3.
    """
    layers = find_layers(float_graph)
    missing = [name for name in model.layers() if name not in eigenvalues]
    if missing:
        raise ValueError(f"there is no eigenvalue for layer {missing[0]!r}: compute layer_report(..., eigenvalues=True)")
    with torch.no_grad():
        change = {
            name: float((layer.weight() - get_tensor(float_graph, layers[name].weight)).square().sum())
            for name, layer in model.layers().items()
        }
    return sorted(change, key=lambda name: eigenvalues[name] * change[name], reverse=True)


class _DivergedError(Exception):
    """The loss or a parameter is NaN or Inf."""


@dataclass
class _Training:
    """The state of a training that can be kept and restored, and one epoch of it."""

    twin: fx.GraphModule
    teacher: Objective
    epochs: int
    learning_rate: float
    distillation: float
    order: Sequence[str] | None
    generator: torch.Generator | None
    key: dict[str, Any]  # what a checkpoint must agree with
    epoch: int = 0
    halvings: int = 0

    def __post_init__(self) -> None:
        groups = [{"params": [p], "unit": _unit(self.twin, name)} for name, p in self.twin.named_parameters()]
        self.optimizer = torch.optim.Adam(groups, lr=self.learning_rate)

    def run_epoch(self) -> float:
        """One pass over the data; the mean training loss."""
        if self.order is not None:
            share = min(1.0, (self.epoch + 1) / (_STAGED_SHARE * self.epochs))
            for position, name in enumerate(self.order):
                trainable_layer(self.twin, name).rounded = position < math.ceil(share * len(self.order))
        total, steps = 0.0, 0
        expected = length_hint(self.teacher.data)
        with torch.enable_grad():
            for batch in self.teacher.batches():
                if self.teacher.weight(batch) > 0:
                    self._set_rate(steps / expected if expected else 0.0)
                    total += self._step(batch)
                    steps += 1
        if not all(torch.isfinite(parameter).all() for parameter in self.twin.parameters()):
            raise _DivergedError
        self.epoch += 1
        return total / max(steps, 1)

    def _set_rate(self, fraction: float) -> None:
        """Half a cosine over all epochs, `fraction` of the current one done."""
        done = min(1.0, (self.epoch + fraction) / self.epochs)
        rate = self.learning_rate * 0.5**self.halvings * 0.5 * (1 + math.cos(math.pi * done))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["unit"]

    def _step(self, batch: Any) -> float:
        with torch.no_grad():
            wanted = self.teacher.outputs(batch)
            self.teacher.batch_loss(wanted, batch)  # says which example is wrong, if one is
        outputs = self.twin(batch[0])
        value = self.teacher.loss(outputs, self.teacher.targets(batch)).reshape(())
        if self.teacher.is_sum:
            value = value / count_examples(batch)
        if self.distillation:
            value = value + self.distillation * _distance(outputs, wanted, is_classification(self.teacher.loss))
        if not torch.isfinite(value):
            raise _DivergedError
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()
        return float(value.detach())

    def snapshot(self) -> bytes:
        """All that the next epoch depends on, beside the data."""
        state = {
            "key": self.key,
            "epoch": self.epoch,
            "halvings": self.halvings,
            "parameters": {name: parameter.detach() for name, parameter in self.twin.named_parameters()},
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state() if self.generator is None else self.generator.get_state(),
        }
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    @torch.no_grad()
    def restore(self, snapshot: bytes, path: str = "") -> None:
        """Go back to where `snapshot` was taken; ValueError if that was another training's."""
        state = torch.load(io.BytesIO(snapshot), map_location="cpu", weights_only=True)
        different = [name for name, value in self.key.items() if state["key"].get(name) != value]
        if different:
            raise ValueError(f"{path} is a checkpoint with other {' and '.join(different)}: name another file or delete it")
        self.epoch, self.halvings = state["epoch"], state["halvings"]
        for name, parameter in self.twin.named_parameters():
            parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.generator is None:
            torch.set_rng_state(state["random"])
        else:
            self.generator.set_state(state["random"])

    def roll_back(self, good: bytes) -> None:
        """Go back to `good` with half the learning rate; ValueError if that was done too often."""
        halvings, blamed = self.halvings + 1, self._largest()
        rate = self.learning_rate * 0.5**halvings
        if halvings > _MAX_HALVINGS:
            raise ValueError(
                f"fine-tuning diverges even at a learning rate of {2 * rate:.3g}, {blamed} first: train at a lower rate"
            )
        self.restore(good)
        self.halvings = halvings
        logger.warning(
            "not finite in epoch %d, %s first: back to the end of epoch %d, with a learning rate of %.3g",
            self.epoch + 1,
            blamed,
            self.epoch,
            rate,
        )

    def _largest(self) -> str:
        """The first module with a parameter that is not finite, else the one furthest out in its own units."""
        size = {
            name: float(parameter.detach().abs().max()) / group["unit"]
            for (name, parameter), group in zip(self.twin.named_parameters(), self.optimizer.param_groups, strict=True)
        }
        name = max(size, key=lambda name: size[name] if math.isfinite(size[name]) else math.inf)
        return f"{name.removeprefix(f'{LAYERS}.').rpartition('.')[0]!r}"


def _unit(twin: fx.GraphModule, name: str) -> float:
    """What the learning rate of a parameter is counted in."""
    owner = twin.get_submodule(name.rpartition(".")[0])
    parameter = twin.get_parameter(name).detach()
    if not isinstance(owner, TrainableLayer):
        return 1.0 if isinstance(owner, TrainableQuantizer) else _root_mean_square(parameter)
    if not name.endswith(".bias"):
        return 1.0  # latent weights and logarithms of steps are in units of the first steps
    return _root_mean_square(owner.real_weight().detach().flatten(1).norm(dim=1))


def _root_mean_square(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt()) or 1.0


def _distance(outputs: Any, wanted: Any, classification: bool) -> torch.Tensor:
    """How far the outputs are from the float network's: KL by example (and position) of classes, else mean squares."""
    if classification:
        classes = 1 if outputs.dim() > 1 else 0
        log_p, log_q = F.log_softmax(wanted, classes), F.log_softmax(outputs, classes)
        return F.kl_div(log_q, log_p, log_target=True, reduction="sum") / (outputs.numel() / outputs.shape[classes])
    pairs = zip(tensors_of(outputs), tensors_of(wanted), strict=True)
    return torch.stack([F.mse_loss(ours, theirs) for ours, theirs in pairs]).sum()


def _check(
    model: QuantizedModel,
    float_graph: fx.GraphModule,
    epochs: int,
    learning_rate: float,
    distillation: float,
    order: Sequence[str] | None,
) -> None:
    if epochs < 0:
        raise ValueError(f"epochs={epochs}: give the number of passes over the data, 0 or more")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate={learning_rate}: give a positive number, such as 0.005")
    if not 0 <= distillation < math.inf:
        raise ValueError(f"distillation={distillation}: give a weight of 0 or more")
    layers = find_layers(float_graph)
    for name, layer in model.layers().items():
        if name not in layers:
            raise ValueError(f"the float graph has no layer {name!r}: pass the graph that the model was quantized from")
        shape = get_tensor(float_graph, layers[name].weight).shape
        if shape != layer.codes.shape:
            raise ValueError(
                f"layer {name!r} has shape {tuple(shape)} in the float graph, {tuple(layer.codes.shape)} in the model: pass "
                "the graph that the model was quantized from"
            )
    if order is not None and sorted(order) != sorted(model.layers()):
        wrong = sorted(set(order) ^ set(model.layers())) or sorted(name for name in order if list(order).count(name) > 1)
        raise ValueError(f"`order` must name every quantized layer once: {wrong[0]!r} is missing, repeated or unknown")
