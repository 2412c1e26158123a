"""Small networks, data and losses that several tests share."""

import torch
from torch import nn
from torch.nn import functional as F


class ConvNet(nn.Module):
    """Convolution, batch norm, ReLU, depthwise and strided convolutions, a residual sum, pooling, linear."""

    def __init__(self, channels: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=2, dilation=2, groups=channels)
        self.project = nn.Conv2d(channels, channels, 1)
        self.down = nn.Conv2d(channels, 2 * channels, 3, stride=2, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * channels)
        self.fc = nn.Linear(2 * channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.project(F.relu6(self.depthwise(x))))
        x = F.max_pool2d(F.relu(self.bn2(self.down(x))), 2)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class SequenceNet(nn.Module):
    """Linear layers on (N, T, C), a 1-d and a transposed convolution; padding inside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.conv = nn.Conv1d(4, 6, 3, stride=2)
        self.up = nn.ConvTranspose1d(6, 5, 3, stride=2, padding=1)
        self.fc = nn.Linear(5, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.leaky_relu(self.inner(x)).transpose(1, 2)
        x = F.relu(self.conv(F.pad(x, (2, 0))))
        return self.fc(F.hardtanh(self.up(x)).amax(2))


class SmoothNet(nn.Module):
    """An MLP with GELU and layer norm: curved in its first weights, linear in its last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.gelu(self.norm(self.first(x))))


def seeded(build: type[nn.Module], seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """An instance in evaluation mode whose batch norms have statistics and affine parameters of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().to(dtype)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def classification(
    *shape: int, classes: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal inputs of that shape (examples first) and random classes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(0, classes, shape[:1], generator=generator)
