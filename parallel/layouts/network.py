"""A network whose layers are laid out each in its own way over a group of ranks that share its examples."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F
from torch.utils import _pytree as tree

from parallel.halo import Exchange, partition
from parallel.layer_cost import Layout
from parallel.layouts import domain
from parallel.layouts.batch_norm import GlobalBatchNorm, globalize
from parallel.layouts.laid import Division, Laid
from parallel.layouts.replicated import gathered, used_in_parts

_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


class LaidOut(nn.Module):
    """`model` with the layers of `layouts` (module name to layout) divided among the ranks of mesh["shared"].

    mesh: of two dimensions, "batch" and "shared"; the ranks of a shared group have the same examples, N of them, and each
    returns the outputs of its own (`own_examples`). tiles: how many along height and width `domain` layers divide images into,
    whose product is the size of a shared group; rows alone by default. Layers with weights that are not named are laid out by
    batch, those without keep the layout of what they are given. Weights of `model` layers become DTensors, divided by output
    channels; all others stay whole, and their gradients are those of this rank's part of the work: `gradient_group` says over
    which ranks each must be summed. The model itself is changed. Collective.

    Raises ValueError for a layer that cannot be laid out as asked, naming it and what it can be.
    """

    def __init__(
        self, model: nn.Module, layouts: Mapping[str, Layout], mesh: DeviceMesh, *, tiles: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        if mesh.size() != distributed.get_world_size():
            raise ValueError(f"the mesh has {mesh.size()} of {distributed.get_world_size()} ranks: it must have all")
        self.mesh, self.layouts = mesh, dict(layouts)
        self.group = mesh["shared"].get_group()
        ranks = distributed.get_world_size(self.group)
        self.tiles = (ranks, 1) if tiles is None else tiles
        if math.prod(self.tiles) != ranks:
            raise ValueError(
                f"images in {self.tiles[0]} x {self.tiles[1]} tiles for {ranks} ranks: the product must be {ranks}"
            )
        self.model = model
        globalize(model, None)
        self._within_model: set[str] = set()
        modules = dict(self.model.named_modules())
        for name, layout in layouts.items():
            if name not in modules:
                raise ValueError(f"there is no layer {name!r} to lay out: the model has {', '.join(list(modules)[1:6])} ...")
            self._lay_out(name, modules[name], layout)
        for name, module in modules.items():
            is_leaf = not any(True for _ in module.children())  # weights elsewhere are seen where they are used, by `Laid`
            if name not in layouts and is_leaf and any(True for _ in module.parameters()):
                self._lay_out(name, module, "batch")

    def own_examples(self, examples: int) -> tuple[int, int]:
        """Which of the group's examples this rank's outputs are of."""
        return partition(examples, distributed.get_world_size(self.group))[distributed.get_rank(self.group)]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The outputs of this rank's examples; `inputs` are all examples of the group."""
        whole = Laid.of(inputs, Division("model", len(inputs), self.group, self.tiles))
        outputs = self.model(whole)
        if not isinstance(outputs, Laid):
            raise TypeError(f"the model returns a {type(outputs).__name__}, not one tensor computed from its input")
        return outputs.laid("batch").part

    def gradient_group(self, name: str) -> ProcessGroup | None:
        """The ranks over which the gradient of parameter `name` of the model is to be summed; None: all."""
        return self.mesh["batch"].get_group() if name in self._within_model else None

    def _lay_out(self, name: str, module: nn.Module, layout: Layout) -> None:
        if layout == "model":
            self._within_model |= {f"{name}.{own}" for own, _ in module.named_parameters(recurse=False)}
        if layout == "model" and divides_channels(module):
            assert isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
            forward = self._channels(name, module)
        elif layout == "domain":
            forward = self._tiles(name, module)
        else:
            if isinstance(module, GlobalBatchNorm) and layout == "model":
                module.group = self.mesh["batch"].get_group()
            forward = _on_parts(module.forward)

        def laid(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = tree.tree_map(lambda x: x.laid(layout) if isinstance(x, Laid) else x, (args, kwargs))
            return forward(*args, **kwargs)

        module.forward = laid

    def _channels(self, name: str, module: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Callable[[Any], Any]:
        """The 1.5-D algorithm: every rank computes some of the output channels of all examples."""
        ranks, channels = distributed.get_world_size(self.group), module.weight.shape[0]
        share = math.ceil(channels / ranks)
        if (ranks - 1) * share >= channels:
            raise ValueError(f"{name!r} has {channels} output channels for {ranks} ranks: lay it out by batch")
        mesh = self.mesh["shared"]
        for own, parameter in list(module.named_parameters(recurse=False)):
            divided = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
            setattr(module, own, nn.Parameter(divided, requires_grad=parameter.requires_grad))
        owned = tuple(((min(rank * share, channels), min((rank + 1) * share, channels)),) for rank in range(ranks))

        def forward(x: Laid) -> Laid:
            part = x.part
            dim = part.dim() - 1 if isinstance(module, nn.Linear) else 1
            part = used_in_parts(part, self.group) if part.requires_grad else part
            weight, bias = _own(module.weight), None if module.bias is None else _own(module.bias)
            if isinstance(module, nn.Linear):
                y = F.linear(part, weight, bias)
            else:
                function = _CONVOLUTIONS[type(module)]
                y = function(part, weight, bias, module.stride, module.padding, module.dilation)
            whole = Exchange(owned, (((0, channels),),) * ranks, (dim,), self.group)
            return Laid.of(gathered(y, whole), x.division)

        return forward

    def _tiles(self, name: str, module: nn.Module) -> Callable[[Any], Any]:
        """Halo exchange: every rank computes a tile of all examples."""
        if isinstance(module, GlobalBatchNorm):
            return _on_parts(module.forward)  # moments over all ranks' tiles are those of all images
        following = list(self.layouts.values())[list(self.layouts).index(name) + 1 :]
        otherwise: Layout = next((layout for layout in following if layout != "domain"), "batch")
        if not divides_rows(module):
            raise ValueError(f"{name!r} is a {type(module).__name__}, whose rows cannot be divided: lay it out by batch")

        def forward(x: Laid) -> Laid:
            tiles = x.division.tiles
            if isinstance(module, nn.Conv2d):
                y, after = domain.conv2d(
                    x.part,
                    tiles,
                    module.weight,
                    module.bias,
                    stride=_pair(module.stride),
                    padding=_padding(module),
                    dilation=_pair(module.dilation),
                    groups=module.groups,
                )
            elif isinstance(module, nn.MaxPool2d):
                y, after = domain.max_pool2d(
                    x.part, tiles, _pair(module.kernel_size), stride=_pair(module.stride), padding=_pair(module.padding)
                )
            elif isinstance(module, nn.Upsample):
                y, after = domain.upsample(x.part, tiles, _factor(module), module.mode)  # type: ignore[arg-type]  # one of both
            else:
                assert isinstance(module, nn.AvgPool2d)
                y, after = domain.avg_pool2d(
                    x.part, tiles, _pair(module.kernel_size), stride=_pair(module.stride), padding=_pair(module.padding)
                )
            return Laid.of(y, replace(x.division, size=after.size, otherwise=otherwise))

        return forward


def _on_parts(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer that computes each rank's part as it would all."""

    def on_parts(*args: Any, **kwargs: Any) -> Any:
        laid = [x for x in tree.tree_leaves((args, kwargs)) if isinstance(x, Laid)]
        args, kwargs = tree.tree_map(lambda x: x.part if isinstance(x, Laid) else x, (args, kwargs))
        result = forward(*args, **kwargs)
        if not laid:
            return result
        return tree.tree_map(lambda y: Laid.of(y, laid[0].division) if isinstance(y, torch.Tensor) else y, result)

    return on_parts


def divides_rows(module: nn.Module) -> bool:
    """Whether a layer can be laid out by domain."""
    if isinstance(module, nn.Conv2d):
        return module.padding_mode == "zeros"
    if isinstance(module, nn.MaxPool2d):
        return not module.ceil_mode and _pair(module.dilation) == (1, 1) and not module.return_indices
    if isinstance(module, nn.AvgPool2d):
        simple = not module.ceil_mode and module.divisor_override is None
        return simple and (bool(module.count_include_pad) or _pair(module.padding) == (0, 0))
    if isinstance(module, nn.Upsample):
        return module.mode in get_args(domain.Interpolation) and not module.align_corners and all(_factor(module))
    return isinstance(module, nn.BatchNorm2d | GlobalBatchNorm)


def divides_channels(module: nn.Module) -> bool:
    """Whether the layout by model divides a layer's weights; those of others are on every rank, which computes all of it."""
    if isinstance(module, nn.Linear):
        return True
    return type(module) in _CONVOLUTIONS and (module.groups, module.padding_mode) == (1, "zeros")


def _padding(module: nn.Conv2d) -> tuple[int, int]:
    if module.padding == "same":
        reach = [dilation * (kernel - 1) for kernel, dilation in zip(module.kernel_size, module.dilation, strict=True)]
        if any(one % 2 for one in reach):
            raise ValueError("padding='same' of an even kernel is not the same on both sides: lay this layer out by batch")
        return reach[0] // 2, reach[1] // 2
    return (0, 0) if module.padding == "valid" else _pair(module.padding)


def _factor(module: nn.Upsample) -> tuple[int, int]:
    """How many times height and width become larger; (0, 0) where that is no whole number, or not known."""
    factors = module.scale_factor if isinstance(module.scale_factor, tuple) else (module.scale_factor,) * 2
    if any(one is None or one != int(one) for one in factors):
        return 0, 0
    return _pair(factors)


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, tuple | list) else (value, value)
    return int(first), int(second)


def _own(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's channels."""
    assert isinstance(parameter, DTensor)
    return parameter.to_local()
