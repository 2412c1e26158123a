"""A zoo of networks as their authors write them: everything that must survive tracing, folding, rounding and export."""

import functools
from collections.abc import Callable

import torch
from torch import fx, nn
from torch.nn import functional as F

from hawq.fold import folded
from hawq.graph import Layer, find_layers
from tests.cases import ConvNet


class Padded1d(nn.Module):
    """An audio net: long kernels, padding inside forward, batch norm after the ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 6, 9, stride=2)
        self.bn = nn.BatchNorm1d(6)
        self.second = nn.Conv1d(6, 8, 5, dilation=2, bias=False)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(F.relu(self.first(F.pad(x, (4, 4)))))
        return self.fc(F.relu(self.second(x)).mean(2))


class InPlace(nn.Module):
    """In-place activations and an in-place residual sum, layers as direct attributes, a tensor with two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 8, 3, padding="same", bias=False)
        self.b1 = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.c2 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.b1(self.c1(x)))
        y = self.c2(x)
        y += x
        return self.head(self.act(y))


class Functional(nn.Module):
    """Weights that belong to no layer module."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 3, 3, 3) / 5)
        self.b = nn.Parameter(torch.randn(6) / 5)
        self.head = nn.Parameter(torch.randn(5, 6) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.relu(F.conv2d(x, self.w, self.b, stride=2)).amax((2, 3)), self.head)


class OwnScale(nn.Conv2d):
    """A layer with a parameter of its own, called as the integer layer calls one of its own."""

    def __init__(self, *arguments: int) -> None:
        super().__init__(*arguments)
        self.scale = nn.Parameter(torch.full((arguments[1],), 3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale.view(-1, 1, 1)


class Shared(nn.Module):
    """One module called twice: its weight stays in float, the rest is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.twice(F.relu(self.twice(F.relu(self.stem(x))))))
        return self.fc(x.mean((2, 3)))


class Branches(nn.Module):
    """Concatenation, scaled residuals, squeeze-and-excite, hard-swish, SiLU, hard-tanh, padding with a value."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(3, 4, 3, padding=1)
        self.squeeze = nn.Linear(8, 8)
        self.c = nn.Conv2d(8, 8, 3, groups=2, padding=1)
        self.d = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([F.hardswish(self.a(x)), F.silu(self.b(x))], 1)
        x = x * torch.sigmoid(self.squeeze(x.mean((2, 3))))[:, :, None, None]
        x = x + 0.5 * F.hardtanh(self.c(x))
        x = self.d(F.pad(F.relu(x), (1, 1, 1, 1), value=2.0))
        return self.fc(F.max_pool2d(x, 2).mean((2, 3)))


class Tokens(nn.Module):
    """Linear layers on (N, T, C), layer norm, GELU, a constant buffer, batch norm over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 12)
        self.norm = nn.LayerNorm(12)
        self.outer = nn.Linear(12, 6)
        self.over_tokens = nn.BatchNorm1d(7)
        self.fc = nn.Linear(6, 5, bias=False)
        self.register_buffer("offset", torch.linspace(-1, 1, 6), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.over_tokens(self.outer(F.gelu(self.norm(self.inner(x + self.offset)))))
        return self.fc(x).mean(1)


class FoldedTime(nn.Module):
    """Time folded into the batch: a layer sees five rows for every example."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.c(x.flatten(0, 1))).mean((2, 3))
        return self.fc(x.unflatten(0, (-1, 5)).mean(1))


class Volume(nn.Module):
    """Three dimensions, and a convolution as the network's output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 4, 3, padding=1)
        self.out = nn.Conv3d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(F.avg_pool3d(F.relu(self.stem(x)), 2))


ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv net": (ConvNet, (1, 12, 12)),
    "audio, padded inside": (Padded1d, (2, 60)),
    "in place": (InPlace, (3, 8, 8)),
    "functional weights": (Functional, (3, 9, 9)),
    "a parameter called scale": (
        lambda: nn.Sequential(OwnScale(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)),
        (3, 8, 8),
    ),
    "a module called twice": (Shared, (3, 8, 8)),
    "branches": (Branches, (3, 8, 8)),
    "tokens": (Tokens, (7, 6)),
    "time in the batch": (FoldedTime, (5, 3, 8, 8)),
    "volume": (Volume, (1, 4, 6, 6)),
    "a layer by itself": (lambda: nn.Linear(6, 4), (6,)),
    "direct convolutions": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), (3, 9, 9)),
}


def build(name: str, examples: int = 16) -> tuple[nn.Module, torch.Tensor]:
    """A network of the zoo in evaluation mode, its batch norms with statistics, and inputs for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        factory, shape = ZOO[name]
        model = factory()
        inputs = torch.randn(examples, *shape)
        model.train()
        with torch.no_grad():
            for _ in range(20):
                model(inputs)
    return model.eval(), inputs


def classes(count: int, examples: int) -> torch.Tensor:
    return torch.randint(0, count, (examples,), generator=torch.Generator().manual_seed(1))


@functools.cache  # tests must not change what it returns
def case(name: str, examples: int = 16) -> tuple[fx.GraphModule, dict[str, Layer], tuple[torch.Tensor, torch.Tensor]]:
    """A network of the zoo as a folded graph, its layers, and classification data."""
    model, inputs = build(name, examples)
    graph = folded(model, inputs)
    outputs = graph(inputs).shape[1]
    return graph, find_layers(graph), (inputs, classes(outputs, examples))
