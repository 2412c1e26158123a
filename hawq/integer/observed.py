"""The 8-bit tensors inside onnxruntime, as the kernels of the exported file compute them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hawq import runtime
from hawq.layers import ActivationQuantizer
from hawq.model import QuantizedModel


@dataclass(frozen=True)
class Observed:
    """outputs: float32. codes: uint8 by the name of the quantizer's node in the network's graph."""

    outputs: torch.Tensor
    codes: dict[str, torch.Tensor]


class ObservedRuntime:
    """A session of `exported`, the ONNX file of `model`, whose inner 8-bit tensors are outputs too.

    Outputs are added to the graph that the runtime itself has optimized, and that graph runs without further
    optimization: asked of the file, they could keep operations from being fused. `kernels`: the operator that computes
    each quantizer's codes. A quantizer that the runtime has optimized away is in neither.

    Raises RuntimeError where the file's quantizers are not those of the network, one by one and in order.
    """

    def __init__(self, model: QuantizedModel, exported: bytes) -> None:
        import onnx

        optimized = runtime.optimized(exported)
        computed = {name: node.op_type for node in optimized.graph.node for name in node.output}
        written = _quantized(model, onnx.load_from_string(exported).graph)
        self._names = {name: value for name, value in written.items() if value in computed}
        self.kernels = {name: computed[value] for name, value in self._names.items()}
        present = {value.name for value in optimized.graph.output}
        for value in dict.fromkeys(self._names.values()):
            if value not in present:
                uint8 = onnx.helper.make_tensor_value_info(value, onnx.TensorProto.UINT8, None)
                optimized.graph.output.append(uint8)
        self._session = runtime.open_session(optimized.SerializeToString(), threads=1, level="none")
        self.shipped = runtime.network(exported)

    def __call__(self, inputs: torch.Tensor) -> Observed:
        values = dict(
            zip([item.name for item in self._session.get_outputs()], self._session.run(None, {"input": inputs.numpy()}))
        )
        codes = {name: torch.from_numpy(values[value]) for name, value in self._names.items()}
        return Observed(torch.from_numpy(values["output"]), codes)


def _quantized(model: QuantizedModel, exported: Any) -> dict[str, str]:
    """For each quantizer's node the name of the tensor that QuantizeLinear writes in the exported graph."""
    from onnx import numpy_helper

    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in exported.initializer}
    written = [node for node in exported.node if node.op_type == "QuantizeLinear"]
    nodes = [(node, model.get_submodule(str(node.target))) for node in model.graph.nodes if node.op == "call_module"]
    quantizers = [(node, module) for node, module in nodes if isinstance(module, ActivationQuantizer)]
    if len(written) != len(quantizers):
        raise RuntimeError(f"the file quantizes {len(written)} times, the network {len(quantizers)} times")
    for line, (node, module) in zip(written, quantizers, strict=True):
        for name, value in zip(line.input[1:3], (module.scale, module.zero_point), strict=True):
            if name not in arrays or not np.array_equal(arrays[name], value.numpy()):
                raise RuntimeError(f"{name} in the file is not what {node.name} has in the network")
    return {node.name: line.output[0] for line, (node, _) in zip(written, quantizers, strict=True)}
