"""Square crops of scikit-learn's two photographs: real images for networks that were trained on ImageNet."""

import torch
from torch import nn

SMALLEST_SIDE = 160  # pixels of a crop before it is resized: nothing is blown up much


def random_crops(name: str, count: int, size: int, *, seed: int) -> torch.Tensor:
    """`count` crops (count, 3, size, size) in 0..255 of "china.jpg" or "flower.jpg": any place, sides of 160 pixels up to
    the photograph's height, every second one mirrored."""
    from sklearn.datasets import load_sample_image  # slow to import, and needed here alone

    photograph = torch.tensor(load_sample_image(name), dtype=torch.float32).permute(2, 0, 1)
    generator = torch.Generator().manual_seed(seed)
    crops = []
    for index in range(count):
        side = int(torch.randint(SMALLEST_SIDE, photograph.shape[1] + 1, (), generator=generator))
        top = int(torch.randint(0, photograph.shape[1] - side + 1, (), generator=generator))
        left = int(torch.randint(0, photograph.shape[2] - side + 1, (), generator=generator))
        crop = photograph[:, top : top + side, left : left + side].unsqueeze(0)
        crop = nn.functional.interpolate(crop, (size, size), mode="bilinear", align_corners=False, antialias=True)
        crops.append(crop.flip(3) if index % 2 else crop)
    return torch.cat(crops).clamp(0, 255)
