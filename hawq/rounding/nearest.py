"""Round to nearest, on the per-channel scales of least squared error."""

import torch

from hawq.affine import per_channel, quantize, signed_range
from hawq.observers import weight_scale


def round_to_nearest(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (int8, shaped like `weight`) and scales (channels,) for a weight with its output channels first."""
    scale = weight_scale(weight, bits)
    codes = quantize(weight.detach(), per_channel(scale, weight), 0, *signed_range(bits))
    return codes.to(torch.int8), scale
