"""A small MobileNetV2 (Sandler et al. 2018): inverted residuals around depthwise 3x3 convolutions."""

import torch
from torch import nn


def conv_bn_relu6(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter each channel by 3x3, project by 1x1 without activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.expand = conv_bn_relu6(in_channels, hidden, 1)
        self.depthwise = conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden)
        self.project = nn.Sequential(nn.Conv2d(hidden, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.has_shortcut else out


class MobileNet(nn.Module):
    """MobileNetV2 for small images: eight inverted residuals from 16 to 48 channels.

    Input (N, in_channels, H, W); output (N, num_classes) logits.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels = 16
        for out_channels, stride, repeats in ((16, 1, 2), (24, 2, 2), (32, 2, 2), (48, 1, 2)):
            for index in range(repeats):
                blocks.append(InvertedResidual(channels, out_channels, stride if index == 0 else 1, expansion=4))
                channels = out_channels
        self.stem = conv_bn_relu6(in_channels, 16, 3)
        self.blocks = nn.Sequential(*blocks)
        self.head = conv_bn_relu6(channels, 128, 1)
        self.classifier = nn.Linear(128, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.head(self.blocks(self.stem(x)))
        return self.classifier(x.mean(dim=(2, 3)))
