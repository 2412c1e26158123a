"""Standard ONNX: weights packed at their true width, quantize/dequantize pairs where integer kernels can fuse.

Weights narrower than 8 bits are stored as bit planes (see `hawq.packing`) and unpacked by standard operators, which a
runtime folds into int8 when it loads the file. No custom operator is used.
"""

import copy
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hawq.layers import LAYERS
from hawq.model import QuantizedModel
from hessian.files import write_atomically

OPSET = 21

LARGEST_FILE = 2**31 - 2**20  # bytes; protobuf holds 2 GiB
_EXTERNAL_TENSOR = 1024  # bytes from which on a tensor goes into the second file


def export_onnx(model: nn.Module, path: str | os.PathLike[str], example_input: torch.Tensor) -> None:
    """Write `model` to `path`, atomically; its batch dimension is dynamic, its input `input`, its output `output`.

    `model`: a QuantizedModel, or any float network. Layers read int8 weights through DequantizeLinear, so that a runtime
    fuses them with the activations' quantize/dequantize pairs. Where activations are float, weights are multiplied by
    their scales instead, which a runtime folds when it loads the file.

    Above 2 GiB, the weights go into a second file, `path`.data, which must stay beside the first (ONNX's external data).

    Raises ModuleNotFoundError, naming the pip line, if the `onnx` extra is not installed.
    """
    path = Path(path)
    proto = _proto(model, example_input)
    if _size(proto) > LARGEST_FILE:
        write_atomically(path.with_name(f"{path.name}.data"), _moved_out(proto, f"{path.name}.data"))
    _check(proto)
    write_atomically(path, proto.SerializeToString())


def to_bytes(model: nn.Module, example_input: torch.Tensor) -> bytes:
    """The contents of the file that `export_onnx` writes; ValueError above 2 GiB."""
    proto = _proto(model, example_input)
    if _size(proto) > LARGEST_FILE:
        raise ValueError(f"the network has {_size(proto):,} bytes, more than one ONNX file holds: hawq.export_onnx writes two")
    _check(proto)
    content: bytes = proto.SerializeToString()
    return content


def _check(proto: Any) -> None:
    import onnx

    if not any(tensor.external_data for tensor in proto.graph.initializer):  # the checker would look for the second file
        onnx.checker.check_model(proto)


def _size(proto: Any) -> int:
    """Bytes of all weights; protobuf itself cannot tell above 2 GiB."""
    return sum(len(tensor.raw_data) for tensor in proto.graph.initializer)


def _moved_out(proto: Any, name: str) -> bytes:
    """The contents of the second file; the tensors in `proto` then say where in it they lie."""
    from onnx.external_data_helper import set_external_data

    content = bytearray()
    for tensor in proto.graph.initializer:
        if len(tensor.raw_data) >= _EXTERNAL_TENSOR:
            data = tensor.raw_data
            set_external_data(tensor, location=name, offset=len(content), length=len(data))
            tensor.ClearField("raw_data")
            content += data
    return bytes(content)


def _proto(model: nn.Module, example_input: torch.Tensor) -> Any:
    """The ONNX model."""
    try:
        import onnx  # noqa: F401 - torch.onnx needs both
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name} is needed to write ONNX: pip install 'hessianware[onnx]'") from error
    from hawq import onnx_rewrite

    proto = _export(model, example_input)
    graph = onnx_rewrite.GraphRewriter(proto.graph)
    if isinstance(model, QuantizedModel):
        if model.activation_bits is None:
            in_float = model.layers()
        else:
            onnx_rewrite.multiply_integers(graph)
            scales = {name: f"{quantizer}.scale" for name, quantizer in model.input_quantizers().items()}
            onnx_rewrite.derive_bias_scales(graph, scales)
            in_float = {name: layer for name, layer in model.layers().items() if not layer.has_integer_kernel}
        onnx_rewrite.multiply_scales(graph, in_float)
        for name, layer in model.layers().items():
            if layer.bits < 8:
                onnx_rewrite.store_as_planes(graph, f"{LAYERS}.{name}.codes", layer)
        onnx_rewrite.compact_scales(graph)
    graph.finish()
    proto.metadata_props.clear()
    return proto


def _export(model: nn.Module, example_input: torch.Tensor) -> Any:
    if example_input.shape[0] < 2:
        example_input = torch.cat([example_input, example_input])
    batch = torch.export.Dim.DYNAMIC
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it names every optional package that is not installed
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(copy.deepcopy(model).eval(), (example_input,), dynamic_shapes=({0: batch},))
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=["input"],
                output_names=["output"],
                custom_translation_table=_translations(),
                optimize=True,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert exported is not None
    return exported.model_proto


def _translations() -> dict[Any, Any]:
    from onnx import TensorProto, helper
    from onnxscript import opset21 as op

    def dequantize_weight(codes: Any, scale: Any, axis: int) -> Any:
        if len(scale.shape) == 2:
            return op.DequantizeLinear(codes, scale, axis=1, block_size=codes.shape[1] // scale.shape[1])
        return op.DequantizeLinear(codes, scale, axis=axis)

    def round_activation(x: Any, scale: Any, zero_point: Any, qmax: int) -> Any:
        codes = op.QuantizeLinear(x, scale, zero_point)
        if qmax < 255:
            codes = op.Min(codes, op.Constant(value=helper.make_tensor("qmax", TensorProto.UINT8, [], [qmax])))
        return op.DequantizeLinear(codes, scale, zero_point)

    return {
        torch.ops.hawq.dequantize_weight.default: dequantize_weight,
        torch.ops.hawq.round_activation.default: round_activation,
    }
