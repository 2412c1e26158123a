"""Integers of any width 1 to 8 as bytes, and back.

Codes of b bits are stored as b bit planes: plane j holds bit j of every code (less the lowest code, which makes it
unsigned), eight codes a byte, the first in the lowest bit. An ONNX file unpacks the same planes with standard operators.
"""

import numpy as np
import torch

from hawq.affine import signed_range


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take: each plane is padded to whole bytes."""
    return bits * ((count + 7) // 8)


def pack(codes: torch.Tensor, bits: int, lowest: torch.Tensor | None = None) -> torch.Tensor:
    """Bit planes of codes: uint8, shape (bits, ceil(number of codes / 8)).

    lowest: the lowest code, a tensor that broadcasts to the codes; by default -2^(bits-1). Raises ValueError for a width
    outside 1 to 8 and for codes that are not among the 2^bits from the lowest on.

    >>> planes = pack(torch.tensor([-2, -1, 0, 1], dtype=torch.int8), bits=2)
    >>> planes.flatten().tolist()  # codes 0, 1, 2, 3: their low bits 0101 and high bits 0011, the first in the lowest
    [10, 12]
    >>> unpack(planes, 2, (4,)).tolist()
    [-2, -1, 0, 1]
    """
    unsigned = codes.to("cpu", torch.int16) - _lowest(bits, lowest)
    if unsigned.numel() and (int(unsigned.min()) < 0 or int(unsigned.max()) >= 2**bits):
        ends = f"{int(codes.min())} to {int(codes.max())}"
        least = "their lowest codes" if lowest is not None else "{} to {}".format(*signed_range(bits))
        raise ValueError(f"codes from {ends} do not fit {bits} bits: {least}")
    flat = unsigned.reshape(-1).numpy().astype(np.uint8)
    planes = (flat[None, :] >> np.arange(bits, dtype=np.uint8)[:, None]) & 1
    return torch.from_numpy(np.packbits(planes, axis=1, bitorder="little"))


def unpack(planes: torch.Tensor, bits: int, shape: tuple[int, ...], lowest: torch.Tensor | None = None) -> torch.Tensor:
    """The int8 codes of that shape; the inverse of `pack`."""
    least = _lowest(bits, lowest)
    count = int(np.prod(shape, dtype=np.int64))
    if planes.dtype != torch.uint8 or tuple(planes.shape) != (bits, (count + 7) // 8):
        raise ValueError(
            f"planes of shape {tuple(planes.shape)} and {planes.dtype} do not hold {count} codes of {bits} bits: "
            f"expected ({bits}, {(count + 7) // 8}) of torch.uint8"
        )
    digits = np.unpackbits(planes.cpu().numpy(), axis=1, count=count, bitorder="little")
    unsigned = (digits.astype(np.int16) << np.arange(bits, dtype=np.int16)[:, None]).sum(0, dtype=np.int16)
    return (torch.from_numpy(unsigned).reshape(shape) + least).to(torch.int8)


def _lowest(bits: int, lowest: torch.Tensor | None) -> torch.Tensor:
    if not 1 <= bits <= 8:
        raise ValueError(f"a width of {bits} bits: packing takes 1 to 8")
    return torch.tensor(signed_range(bits)[0], dtype=torch.int16) if lowest is None else lowest.to("cpu", torch.int16)
