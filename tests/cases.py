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


class Depthwise(nn.Module):
    """A depthwise and a pointwise convolution with strides and padding, and a 1-d convolution at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.pointwise = nn.Conv2d(4, 3, 1, bias=False)
        self.last = nn.Conv1d(3, 3, 2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pointwise(F.silu(self.norm(self.depthwise(x))))
        return self.last(x.flatten(2)).mean(2)


class Recurrent(nn.Module):
    """An LSTM over (N, T, C) and a linear layer on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.fc = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    """torch's own attention and its fused kernel, layer norm, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = x + F.scaled_dot_product_attention(x, x, F.gelu(x), is_causal=True)
        return self.fc(x).mean(1)


class Tied(nn.Module):
    """One weight used twice, once transposed, under one name and under another."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 3)
        self.decode = nn.Linear(3, 3)
        self.decode.weight = self.encode.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(torch.tanh(F.linear(torch.tanh(self.encode(x)), self.encode.weight.T)))


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
