"""The Kronecker factors of single layers, as hooks read them off training passes."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from hessian.batch import count_examples, tensors_of
from hessian.estimators.per_example import unfold_patches
from parallel.gathered import is_fully_sharded

_PATCH_BYTES = 64 * 2**20  # patches unfolded at a time
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Layer:
    """A layer with factors of its own, and what the passes of a step have added up for them.

    Its weight is an (output_size, input_size) matrix, the bias, if there is one, its last column; that of an embedding is the
    transpose of one and its input factor diagonal, (input_size,).
    """

    def __init__(self, name: str, module: nn.Module, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        self.name, self.module, self.weight, self.bias = name, module, weight, bias
        self.is_embedding = isinstance(module, nn.Embedding)
        rows, columns = weight.shape[0], weight.shape[1:].numel()
        self.output_size = columns if self.is_embedding else rows
        self.input_size = rows if self.is_embedding else columns + (bias is not None)
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.clear()

    def clear(self) -> None:
        """Forget all passes."""
        self._inputs: torch.Tensor | None = None
        self._outputs: torch.Tensor | None = None
        self._positions = 0.0
        self._items: dict[int, float] = {}  # by pass: a layer that is used twice in one sees the same items twice

    def add(self, number: int, inputs: tuple[torch.Tensor, int], outputs: torch.Tensor, items: float) -> None:
        """Add what pass `number` brings: the sum of a a^T and over how many positions, and the sum of g g^T."""
        moment, positions = inputs
        self._inputs = moment if self._inputs is None else self._inputs + moment
        self._outputs = outputs if self._outputs is None else self._outputs + outputs
        self._positions += positions
        self._items[number] = items

    def packed_sums(self) -> torch.Tensor:
        """All sums and counts as one vector, zeros where no pass came by; `unpack_means` reads it."""
        if self._inputs is None or self._outputs is None:
            return torch.zeros(self.packed_size + 2, dtype=self.dtype, device=self.weight.device)
        counts = self._inputs.new_tensor([self._positions, sum(self._items.values())])
        return torch.cat([self.pack(self._inputs, self._outputs), counts])

    def unpack_means(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The factors, of summed `packed_sums`; None where nothing counted."""
        positions, items = packed[-2:].tolist()
        if positions == 0 or items == 0:
            return None
        inputs, outputs = self.unpack(packed[:-2])
        return inputs / positions, outputs / items

    @property
    def packed_size(self) -> int:
        first = self.input_size if self.is_embedding else _triangle(self.input_size)
        return first + _triangle(self.output_size)

    def pack(self, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """Two symmetric matrices (a diagonal first, for an embedding) as one vector, each entry once."""
        return torch.cat([inputs if self.is_embedding else _lower(inputs), _lower(outputs)])

    def unpack(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse of `pack`."""
        first = self.packed_size - _triangle(self.output_size)
        inputs = packed[:first].clone() if self.is_embedding else _symmetric(packed[:first], self.input_size)
        return inputs, _symmetric(packed[first:], self.output_size)

    @torch.no_grad()
    def input_moment(self, inputs: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The sum of a a^T over all positions of a layer's inputs, (I, I) or the diagonal (I,), and how many there are."""
        if self.is_embedding:
            return torch.bincount(inputs.reshape(-1), minlength=self.input_size).to(self.dtype), inputs.numel()
        moment = torch.zeros(self.input_size, self.input_size, dtype=self.dtype, device=inputs.device)
        width, count = self.input_size - (self.bias is not None), 0
        for rows in self._rows(inputs):
            moment[:width, :width] += _second_moment(rows.to(self.dtype))
            if self.bias is not None:  # the 1 behind each a brings their sum and their number
                total = rows.sum(0, dtype=self.dtype)
                moment[width, :width] += total
                moment[:width, width] += total
                moment[width, width] += len(rows)
            count += len(rows)
        return moment, count

    @torch.no_grad()
    def output_moment(self, gradient: torch.Tensor) -> torch.Tensor:
        """The sum of g g^T over all positions of the loss's gradient in a layer's outputs, (O, O)."""
        if isinstance(self.module, _CONVOLUTIONS):
            gradient = gradient.movedim(-1 - len(self.module.kernel_size), -1)
        return _second_moment(gradient.reshape(-1, self.output_size).to(self.dtype))

    def _rows(self, inputs: torch.Tensor) -> Iterator[torch.Tensor]:
        """What each position of the outputs sees, some examples at a time: (N * P, K) each."""
        module = self.module
        if not isinstance(module, _CONVOLUTIONS):
            yield inputs.reshape(-1, inputs.shape[-1])
            return
        dims = len(module.kernel_size)
        if inputs.dim() == dims + 1:
            inputs = inputs.unsqueeze(0)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = F.pad(inputs, module._reversed_padding_repeated_twice, mode)
        out = tuple(
            (size - spread * (width - 1) - 1) // step + 1
            for size, width, step, spread in zip(
                padded.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True
            )
        )
        bytes_each = self.input_size * torch.Size(out).numel() * padded.element_size()
        pieces = padded.split(max(1, _PATCH_BYTES // max(1, bytes_each)))
        settings = (tuple(module.kernel_size), out, module.stride, (0,) * dims, module.dilation, 1)
        for piece in pieces:
            yield unfold_patches(piece, *settings)[:, 0].transpose(1, 2).flatten(0, 1)


class Recorder:
    """Hooks that add the factors' sums of every training pass to its layers while `is_due()`.

    A pass counts when gradients reach a layer; forward passes in evaluation mode or without gradients do not.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], is_due: Callable[[], bool]) -> None:
        self._is_due = is_due
        self._weight: tuple[float, float] | None = None
        self._pass = self._examples = 0
        self._handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self._handles += [layer.module.register_forward_hook(partial(self._read, layer), with_kwargs=True) for layer in layers]

    def weigh(self, items: float, divisor: float) -> None:
        """Of the passes to come: their loss is the sum of the losses of `items` items over `divisor`."""
        self._weight = items, divisor

    def forget(self) -> None:
        """A step is over: another one begins with the next pass."""
        self._pass = self._examples = 0

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if self._is_due():
            self._pass += 1
            self._examples = count_examples([args, kwargs]) if any(one.dim() for one in tensors_of([args, kwargs])) else 1

    def _read(self, layer: Layer, module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        if not (self._is_due() and module.training and torch.is_grad_enabled() and output.requires_grad):
            return
        if self._pass == 0:
            raise RuntimeError(
                f"{layer.name!r} is used outside of the model that K-FAC was made of: call that model, whose passes it counts"
            )
        items, divisor = self._weight or (self._examples, self._examples)
        number = self._pass
        with torch.autocast(output.device.type, enabled=False):  # moments of half precision would be too rough
            inputs = layer.input_moment(next(tensors_of([args, kwargs])).detach())

        # in the backward pass, which recomputed forward passes do not reach a second time
        def add(gradient: torch.Tensor) -> None:
            with torch.autocast(gradient.device.type, enabled=False):
                layer.add(number, inputs, divisor**2 * layer.output_moment(gradient.detach()), items)

        output.register_hook(add)


def covered_layers(model: nn.Module, trained: Sequence[torch.Tensor]) -> list[Layer]:
    """The layers of `model` that K-FAC has factors for, of those whose weights are among `trained`.

    ValueError for a weight that no rank has whole.
    """
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    own = {id(one) for one in trained if one.requires_grad and uses.get(id(one)) == 1}
    found = []
    for name, module in model.named_modules():
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is None or id(weight) not in own or not _has_factors(module):
            continue
        if isinstance(weight, DTensor) and (not is_fully_sharded(model) or sum(map(_is_shard, weight.placements)) > 1):
            raise ValueError(
                f"{name!r} has its weight in parts, and K-FAC needs whole layers on each rank: choose another optimizer"
            )
        if bias is not None and bias.requires_grad and id(bias) not in own:
            continue
        found.append(Layer(name, module, weight, bias if bias is not None and bias.requires_grad else None))
    return found


def _has_factors(module: nn.Module) -> bool:
    if isinstance(module, _CONVOLUTIONS):
        return module.groups == 1
    if isinstance(module, nn.Embedding):
        return not module.sparse and not module.scale_grad_by_freq
    return isinstance(module, nn.Linear)


def _is_shard(placement: Any) -> bool:
    return isinstance(placement, Shard)


def _second_moment(rows: torch.Tensor) -> torch.Tensor:
    return rows.T @ rows


def _triangle(size: int) -> int:
    return size * (size + 1) // 2


def _lower(matrix: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.tril_indices(*matrix.shape, device=matrix.device)
    return matrix[rows, columns]


def _symmetric(packed: torch.Tensor, size: int) -> torch.Tensor:
    rows, columns = torch.tril_indices(size, size, device=packed.device)
    matrix = packed.new_empty(size, size)
    matrix[rows, columns] = packed
    matrix[columns, rows] = packed
    return matrix
