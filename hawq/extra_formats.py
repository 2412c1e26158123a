"""The result for other runtimes: torchao's mixed-precision configuration, and rounded weights as plain floats."""

import json
from typing import Any

import safetensors.torch
from torch import fx

from hawq.graph import find_layers
from hawq.model import QuantizedModel


def torchao_config(model: QuantizedModel, group_size: int | None = None) -> str:
    """JSON of torchao's `FqnToConfig`: each layer's `IntxWeightOnlyConfig`, for `torchao.core.config.config_from_dict`.

    Symmetric widths of weights, each channel (or `group_size` weights) with a scale; torchao chooses the scales anew. Its
    `quantize_` takes the linear layers of the unfolded network, and leaves convolutions as they are.
    """
    granularity = _config("PerAxis", axis=0) if group_size is None else _config("PerGroup", group_size=group_size)
    layers = {
        name: _config(
            "IntxWeightOnlyConfig",
            version=2,
            weight_dtype={"_type": "torch.dtype", "_data": f"int{layer.bits}"},
            granularity=granularity,
            mapping_type={"_type": "MappingType", "_data": "SYMMETRIC"},
        )
        for name, layer in model.layers().items()
    }
    return json.dumps(_config("FqnToConfig", fqn_to_config=layers), indent=1) + "\n"


def _config(kind: str, *, version: int = 1, **data: Any) -> dict[str, Any]:
    return {"_type": kind, "_version": version, "_data": data}


def fake_quantized(model: QuantizedModel, graph: fx.GraphModule) -> bytes:
    """A safetensors file of the folded float graph's state with rounded weights and corrected biases, in float32.

    Names are those of `graph`; a layer that had no bias and got one has it beside its weight, as LAYER.bias.
    """
    tensors = {name: tensor.detach().clone() for name, tensor in graph.state_dict().items()}
    rounded = model.layers()
    for name, layer in find_layers(graph).items():
        if name not in rounded:
            continue
        tensors[layer.weight] = rounded[name].weight().detach()
        bias = rounded[name].real_bias()
        if bias is not None:
            tensors[layer.bias or f"{name}.bias"] = bias.detach().float()
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
