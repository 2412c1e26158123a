"""Integers of any width 1 to 8 as bytes, and back.

Codes of b bits are stored as b bit planes: plane j holds bit j of every code (after adding 2^(b-1), which makes it
unsigned), eight codes a byte, the first in the lowest bit. An ONNX file unpacks the same planes with standard operators.
"""

import numpy as np
import torch

from hawq.affine import signed_range


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take: each plane is padded to whole bytes."""
    return bits * ((count + 7) // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Bit planes of signed codes: uint8, shape (bits, ceil(number of codes / 8)).

    Raises ValueError for a width outside 1 to 8 and for codes outside the width's range.
    """
    _check_width(bits)
    qmin, qmax = signed_range(bits)
    flat = codes.reshape(-1)
    if flat.numel() and (int(flat.min()) < qmin or int(flat.max()) > qmax):
        raise ValueError(f"codes from {int(flat.min())} to {int(flat.max())} do not fit {bits} bits: {qmin} to {qmax}")
    unsigned = (flat.to("cpu", torch.int16).numpy() - qmin).astype(np.uint8)
    planes = (unsigned[None, :] >> np.arange(bits, dtype=np.uint8)[:, None]) & 1
    return torch.from_numpy(np.packbits(planes, axis=1, bitorder="little"))


def unpack(planes: torch.Tensor, bits: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The int8 codes of that shape; the inverse of `pack`."""
    _check_width(bits)
    count = int(np.prod(shape, dtype=np.int64))
    if planes.dtype != torch.uint8 or tuple(planes.shape) != (bits, (count + 7) // 8):
        raise ValueError(
            f"planes of shape {tuple(planes.shape)} and {planes.dtype} do not hold {count} codes of {bits} bits: "
            f"expected ({bits}, {(count + 7) // 8}) of torch.uint8"
        )
    digits = np.unpackbits(planes.cpu().numpy(), axis=1, count=count, bitorder="little")
    unsigned = (digits.astype(np.int16) << np.arange(bits, dtype=np.int16)[:, None]).sum(0)
    return torch.from_numpy((unsigned + signed_range(bits)[0]).astype(np.int8)).reshape(shape)


def _check_width(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"a width of {bits} bits: packing takes 1 to 8")
