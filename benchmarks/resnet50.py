"""ResNet-50 (He et al. 2016, table 1) with random weights, whose batch norms have seen data: a large network for timing."""

import torch
from torch import nn


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up to four times the width, and a shortcut, projected where the shape changes."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * width
        self.body = nn.Sequential(
            *_conv_bn(in_channels, width, 1), nn.ReLU(),
            *_conv_bn(width, width, 3, stride), nn.ReLU(),
            *_conv_bn(width, out_channels, 1),
        )  # fmt: skip
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = nn.Sequential(*_conv_bn(in_channels, out_channels, 1, stride)) if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50(width: int = 64, num_classes: int = 1000) -> nn.Sequential:
    """25.6M parameters at width 64. Input (N, 3, H, W); output (N, num_classes) logits."""
    layers: list[nn.Module] = [*_conv_bn(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = width
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            layers.append(Bottleneck(channels, width << stage, 2 if block == 0 and stage else 1))
            channels = 4 * (width << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


@torch.no_grad()
def settle(model: nn.Module, inputs: torch.Tensor, batch_size: int = 16) -> nn.Module:
    """Batch norms with the mean statistics of the batches of `inputs`; the model in evaluation mode."""
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = None  # a cumulative average
    model.train()
    for batch in inputs.split(batch_size):
        model(batch)
    return model.eval()


def _conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(out_channels)
