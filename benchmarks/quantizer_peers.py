"""Other quantizers on our problems, each behind one function, by what their public documentation says of them.

Bytes of weights are counted alike for all, from the widths a peer was asked for: codes at their width without padding, 4
bytes a scale, and 4 bytes for every weight of a convolution or linear layer that it leaves in float. Embeddings, biases and
norms are not counted; no row quantizes embeddings.
"""

import copy
import importlib.metadata
import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from hawq import runtime

Network = Callable[[torch.Tensor], torch.Tensor]
Kinds = tuple[type[nn.Module], ...]

LAYERS: Kinds = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Problem:
    """A float network, as modules and as an ONNX file with batch norm folded, and the calibration inputs in batches."""

    model: nn.Module
    onnx: bytes
    inputs: list[torch.Tensor]

    def modules(self) -> nn.Module:
        """A copy of the model, its batch norm folded if it has any."""
        model = copy.deepcopy(self.model).eval()
        return fuse(model) if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()) else model

    def weight_bytes(self, bits: int, kinds: Kinds = LAYERS, group: int | None = None) -> int:
        """Bytes with the layers of these kinds at `bits`, a scale for each output channel or `group` weights of one."""
        total = 0
        for layer in self.model.modules():
            if isinstance(layer, kinds):
                rows, columns = len(layer.weight), layer.weight[0].numel()  # type: ignore[arg-type]
                scales = rows * (1 if group is None else math.ceil(columns / group))
                total += math.ceil(rows * columns * bits / 8) + 4 * scales
            elif isinstance(layer, LAYERS):
                total += 4 * layer.weight.numel()  # type: ignore[operator]
        return total


@dataclass(frozen=True)
class Quantized:
    """What a peer made: the network, its bytes of weights, what it left out."""

    network: Network
    weight_bytes: int
    note: str = ""


@dataclass(frozen=True)
class Peer:
    """One way to use a library: the widths of weights it is asked for, and of activations (None: float)."""

    name: str
    distribution: str
    install: str
    bits: tuple[int, ...]
    activations: int | None
    run: Callable[[Problem, int], Quantized]

    def version(self) -> str | None:
        """The installed version, None if there is none."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None


def onnxruntime_static(problem: Problem, bits: int) -> Quantized:
    """onnxruntime's static quantization: QDQ, weights int8 or int4 per channel, activations uint8, ranges min-max."""
    content = onnxruntime_static_file(problem.onnx, problem.inputs, bits)
    return Quantized(runtime.network(content), problem.weight_bytes(bits))


def onnxruntime_static_file(onnx: bytes, inputs: Iterable[torch.Tensor], bits: int = 8) -> bytes:
    """The ONNX file that `quantize_static` makes of a float one."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(inputs)

        def get_next(self) -> Any:
            batch = next(self.batches, None)
            return None if batch is None else {"input": batch.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        source, prepared, result = (Path(folder) / f"{name}.onnx" for name in ("float", "prepared", "quantized"))
        source.write_bytes(onnx)
        quant_pre_process(str(source), str(prepared))
        quantize_static(
            str(prepared),
            str(result),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type={8: QuantType.QInt8, 4: QuantType.QInt4}[bits],
        )
        return result.read_bytes()


def onnxruntime_blocks(problem: Problem, bits: int) -> Quantized:
    """onnxruntime's MatMulNBits: symmetric, a scale for 32 weights; matrix products only."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load_from_string(problem.onnx), bits=bits, block_size=32, is_symmetric=True)
    quantizer.process()
    proto = quantizer.model.model
    count = sum(node.op_type == "MatMulNBits" for node in proto.graph.node)
    layers = [layer for layer in problem.model.modules() if isinstance(layer, LAYERS)]
    if not count:
        raise ValueError(f"none of {len(layers)} layers is a MatMul in the file")
    whole = problem.weight_bytes(bits, (nn.Linear,), 32)
    left = sum(isinstance(layer, nn.Linear) for layer in layers) - count
    note = f"{left} linear layers left in float (not counted so)" if left else ""
    return Quantized(runtime.network(proto.SerializeToString()), whole, note)


def nncf_static(problem: Problem, bits: int) -> Quantized:
    """NNCF's post-training quantization of weights and activations to 8 bits, with fast bias correction."""
    import nncf

    assert bits == 8
    has_attention = not any(isinstance(module, nn.Conv2d) for module in problem.model.modules())
    data = nncf.Dataset([row.unsqueeze(0) for batch in problem.inputs for row in batch])
    count = sum(len(batch) for batch in problem.inputs)
    kind = nncf.ModelType.TRANSFORMER if has_attention else None
    model = nncf.quantize(copy.deepcopy(problem.model).eval(), data, model_type=kind, subset_size=count)
    return Quantized(_without_gradients(model), problem.weight_bytes(bits))


def nncf_weights(problem: Problem, bits: int) -> Quantized:
    """NNCF's weight compression: symmetric, a scale a channel, below 8 bits with scale estimation; convolutions at 8 bits."""
    import nncf

    mode = nncf.CompressWeightsMode[f"INT{bits}_SYM"]
    below = {"all_layers": True, "group_size": -1, "scale_estimation": True} if bits < 8 else {}
    ignored = nncf.IgnoredScope(types=["embedding"], validate=False)
    data = nncf.Dataset(problem.inputs)
    model = nncf.compress_weights(copy.deepcopy(problem.model).eval(), mode=mode, dataset=data, ignored_scope=ignored, **below)
    convolutions = [layer for layer in problem.model.modules() if isinstance(layer, nn.Conv2d)]
    if bits == 8 or not convolutions:
        return Quantized(_without_gradients(model), problem.weight_bytes(bits))
    # A float convolution takes 4 bytes a weight in weight_bytes, an 8-bit one a byte and its channel's scale.
    saved = sum(3 * layer.weight.numel() - 4 * len(layer.weight) for layer in convolutions)
    total = problem.weight_bytes(bits, (nn.Linear,)) - saved
    return Quantized(_without_gradients(model), total, f"{len(convolutions)} convolutions at 8 bits")


def brevitas_weights(problem: Problem, bits: int) -> Quantized:
    """Brevitas: scales a channel by least squares, GPTQ, bias correction; weights only."""
    return _brevitas(problem, bits, activations=False)


def brevitas_both(problem: Problem, bits: int) -> Quantized:
    """The same with the inputs of layers at 8 bits."""
    return _brevitas(problem, bits, activations=True)


@torch.no_grad()
def _brevitas(problem: Problem, bits: int, *, activations: bool) -> Quantized:
    import brevitas.nn as quantized
    from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
    from brevitas.graph.gptq import gptq_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloatMSE

    settings = {"weight_quant": Int8WeightPerChannelFloatMSE, "weight_bit_width": bits, "bias_quant": None}
    settings |= {"return_quant_tensor": False}
    if activations:
        settings["input_quant"] = Int8ActPerTensorFloat
    kinds = {nn.Conv2d: (quantized.QuantConv2d, dict(settings)), nn.Linear: (quantized.QuantLinear, dict(settings))}
    model = layerwise_quantize(problem.modules(), compute_layer_map=kinds).eval()
    _run(model, problem.inputs[:1])  # GPTQ asks for weight quantizers that have run
    if activations:
        with calibration_mode(model):
            _run(model, problem.inputs)
    with gptq_mode(model, use_quant_activations=activations) as gptq:
        for _ in range(gptq.num_layers):
            _run(gptq.model, problem.inputs)
            gptq.update()
    with bias_correction_mode(model):
        _run(model, problem.inputs)
    return Quantized(_without_gradients(model), problem.weight_bytes(bits))


def torchao_weights(problem: Problem, bits: int) -> Quantized:
    """torchao's IntxWeightOnlyConfig, a scale a channel; linear layers only."""
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, quantize_

    model = problem.modules()
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerAxis(0)))
    left = sum(isinstance(layer, nn.Conv2d) for layer in problem.model.modules())
    note = f"{left} convolutions left in float" if left else ""
    return Quantized(_without_gradients(model), problem.weight_bytes(bits, (nn.Linear,)), note)


def _run(model: nn.Module, inputs: Iterable[torch.Tensor]) -> None:
    for batch in inputs:
        model(batch)


def _without_gradients(model: nn.Module) -> Network:
    return torch.no_grad()(model.eval())


_NNCF = "nncf tabulate openvino-telemetry psutil pydot ninja"
_BREVITAS = "brevitas dependencies==2.0.1 unfoldNd"

PEERS = (
    Peer("onnxruntime, static QDQ", "onnxruntime", "onnxruntime", (8, 4), 8, onnxruntime_static),
    Peer("NNCF, quantize", "nncf", _NNCF, (8,), 8, nncf_static),
    Peer("Brevitas, GPTQ", "brevitas", _BREVITAS, (8, 4, 3, 2), 8, brevitas_both),
    Peer("onnxruntime, MatMulNBits", "onnxruntime", "onnxruntime", (8, 4, 2), None, onnxruntime_blocks),
    Peer("NNCF, compress_weights", "nncf", _NNCF, (8, 4, 3, 2), None, nncf_weights),
    Peer("Brevitas, GPTQ", "brevitas", _BREVITAS, (8, 4, 3, 2), None, brevitas_weights),
    Peer("torchao, IntxWeightOnly", "torchao", "torchao", (8, 4, 3, 2), None, torchao_weights),
)
