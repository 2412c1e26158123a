"""A quantized model as a packed safetensors file, and back."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from hawq.affine import spread
from hawq.fold import folded
from hawq.graph import find_layers, get_tensor
from hawq.layers import LAYERS, QUANTIZERS
from hawq.model import QuantizedModel, build
from hawq.packing import pack, unpack
from hessian.files import write_atomically

FILE_NAME = "model.safetensors"
_FORMAT = "hessianware.quantized-model"
_VERSION = 2
_ENTRY = "hessianware"
_ACTIVATION_SCALES = "activations:scale"
_ACTIVATION_ZERO_POINTS = "activations:zero_point"


def save(model: QuantizedModel, folder: str | os.PathLike[str]) -> None:
    """Write `folder`/model.safetensors, atomically.

    For each layer: its codes as bit planes (see `hawq.packing`), scales and bias; the activations' scales and zero
    points; every other tensor of the network as it is. The metadata hold widths, names and a SHA-256 of the contents.
    """
    write_atomically(Path(folder) / FILE_NAME, to_bytes(model))


def to_bytes(model: QuantizedModel) -> bytes:
    """The contents of the file that `save` writes."""
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in model.layers().items():
        lowest = layer.lowest_codes()
        tensors[f"{name}:codes"] = pack(layer.codes, layer.bits, None if lowest is None else layer.spread(lowest))
        tensors[f"{name}:scale"] = compact_scale(layer.scale)
        if lowest is not None:
            tensors[f"{name}:lowest"] = lowest
        if layer.bias is not None:
            tensors[f"{name}:bias"] = layer.bias
    quantizers = list(model.quantizers().values())
    if quantizers:
        tensors[_ACTIVATION_SCALES] = torch.stack([module.scale for module in quantizers])
        tensors[_ACTIVATION_ZERO_POINTS] = torch.stack([module.zero_point for module in quantizers])
    tensors |= {name: get_tensor(model, name) for name in _other_tensors(model)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    description = {
        "format": _FORMAT,
        "version": _VERSION,
        "bits": model.bits,
        "activation_bits": model.activation_bits,
        "quantizers": {name: module.bits for name, module in model.quantizers().items()},
        "example_shape": list(model.example.shape),
        "example_dtype": str(model.example.dtype).removeprefix("torch."),
    }
    description["sha256"] = _digest(description, tensors)
    # One entry: safetensors writes several in any order, and equal models shall give equal files.
    return safetensors.torch.save(tensors, {_ENTRY: json.dumps(description, separators=(",", ":"))})


def load(folder: str | os.PathLike[str], model: nn.Module) -> QuantizedModel:
    """The quantized model that `save` wrote into `folder` (or its file); `model` is the float network's architecture, its
    weights do not matter.

    Raises ValueError for a file that is missing, truncated, tampered with or of another version, and for one that does
    not belong to `model`.
    """
    path = Path(folder) if Path(folder).is_file() else Path(folder) / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    return from_bytes(path.read_bytes(), model, str(path))


def from_bytes(content: bytes, model: nn.Module, path: str = "the file") -> QuantizedModel:
    """The model of a file's contents; `path` names the file in errors. See `load`."""
    description, tensors = _read(content, path)
    try:
        return _assemble(description, tensors, model)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} does not belong to this network: {error}") from error


def _assemble(description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], model: nn.Module) -> QuantizedModel:
    bits: dict[str, int] = description["bits"]
    example = torch.zeros(description["example_shape"], dtype=getattr(torch, description["example_dtype"]))
    graph = folded(model, example)
    layers = find_layers(graph)
    rounded = {}
    for name, width in bits.items():
        if name not in layers:
            raise ValueError(f"it has no layer {name!r}")
        shape = get_tensor(graph, layers[name].weight).shape
        scale, lowest = tensors[f"{name}:scale"].float(), tensors.get(f"{name}:lowest")
        if lowest is not None:
            lowest = spread(lowest, tuple(shape), layers[name].form.channel_axis)
        rounded[name] = unpack(tensors[f"{name}:codes"], width, tuple(shape), lowest), scale
    result = build(graph, rounded, bits, description["activation_bits"], example, description["quantizers"])
    if list(result.quantizers()) != list(description["quantizers"]):
        raise ValueError("its activations are rounded in other places")
    for index, quantizer in enumerate(result.quantizers().values()):
        quantizer.scale, quantizer.zero_point = tensors[_ACTIVATION_SCALES][index], tensors[_ACTIVATION_ZERO_POINTS][index]
    sources = result.input_quantizers()
    for name, layer in result.layers().items():
        layer.bias = tensors.get(f"{name}:bias")
        channels = layer.codes.shape[layer.form.channel_axis : layer.form.channel_axis + 1]
        for part, tensor in (("scale", layer.scale), ("bias", layer.bias)):
            if tensor is not None and tensor.shape[:1] != channels:
                raise ValueError(f"the {part} of layer {name!r} has shape {tuple(tensor.shape)}")
        if layer.bias is not None and layer.bias.dtype == torch.int32:
            layer.bias_scale = get_tensor(result, f"{sources[name]}.scale") * layer.scale
    others = _other_tensors(result)
    surplus = sorted(name for name in tensors if ":" not in name and name not in others)
    if surplus:
        raise ValueError(f"it has no tensor {surplus[0]!r}")
    with torch.no_grad():
        for name in others:
            target = get_tensor(result, name)
            if target.shape != tensors[name].shape:
                raise ValueError(
                    f"{name!r} has shape {tuple(tensors[name].shape)} in the file, {tuple(target.shape)} in the network"
                )
            target.copy_(tensors[name])
    return result


def compact_scale(scale: torch.Tensor) -> torch.Tensor:
    """The scale in float16 where that holds the same numbers."""
    half = scale.half()
    return half if torch.equal(half.float(), scale) else scale


def _other_tensors(model: QuantizedModel) -> list[str]:
    """Names of the tensors that belong neither to a quantized layer nor to a quantizer."""
    everything = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return [name for name in everything if not name.startswith((f"{LAYERS}.", f"{QUANTIZERS}."))]


def _read(content: bytes, path: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The description and the tensors of a file that is whole."""
    try:
        tensors = safetensors.torch.load(content)
        length = int.from_bytes(content[:8], "little")  # of the header, which `load` has found to be sound
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
        description = json.loads(metadata.get(_ENTRY, "{}"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    if (description.get("format"), description.get("version")) != (_FORMAT, _VERSION):
        raise ValueError(f"{path} is not a quantized model of version {_VERSION}: quantize the network anew")
    if description.pop("sha256", None) != _digest(description, tensors):
        raise ValueError(f"{path} was changed after it was written: its contents do not match its checksum")
    return description, tensors


def _digest(description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
