"""Descriptions of well-known networks, so that thousands of ranks can be planned for without one."""

from collections.abc import Callable

from parallel.layer_shape import LayerShape


class _Images:
    """Layers of a network of square images, one after the other."""

    def __init__(self, size: int, channels: int) -> None:
        self.size, self.channels = size, channels
        self.layers: list[LayerShape] = []

    def conv(self, name: str, channels: int, kernel: int, stride: int = 1, padding: int = 0, *, bias: bool = False) -> None:
        weights = channels * (self.channels * kernel**2 + bias)
        self._append(name, weights, channels, channels, kernel, stride, padding)

    def pool(self, name: str, kernel: int, stride: int, padding: int = 0) -> None:
        self._append(name, 0, 0, self.channels, kernel, stride, padding)

    def linear(self, name: str, features: int) -> None:
        inputs = self.channels * self.size**2
        self.layers.append(LayerShape(name, features * (inputs + 1), inputs, features, features))
        self.size, self.channels = 1, features

    def _append(self, name: str, weights: int, divided: int, channels: int, kernel: int, stride: int, padding: int) -> None:
        size = (self.size + 2 * padding - kernel) // stride + 1
        inputs, outputs = self.channels * self.size**2, channels * size**2
        self.layers.append(LayerShape(name, weights, inputs, outputs, divided, self.size, size, kernel, size))
        self.size, self.channels = size, channels


def alexnet() -> list[LayerShape]:
    """AlexNet on 227x227 (Krizhevsky et al. 2012), its convolutions not divided into two towers: 62 million weights."""
    net = _Images(227, 3)
    net.conv("conv1", 96, 11, 4, bias=True)
    net.pool("pool1", 3, 2)
    net.conv("conv2", 256, 5, padding=2, bias=True)
    net.pool("pool2", 3, 2)
    net.conv("conv3", 384, 3, padding=1, bias=True)
    net.conv("conv4", 384, 3, padding=1, bias=True)
    net.conv("conv5", 256, 3, padding=1, bias=True)
    net.pool("pool5", 3, 2)
    net.linear("fc6", 4096)
    net.linear("fc7", 4096)
    net.linear("fc8", 1000)
    return net.layers


def resnet50() -> list[LayerShape]:
    """ResNet-50 on 224x224 (He et al. 2016, strides in the 3x3 convolutions), without batch norms: 25.5 million weights. A
    block's shortcut stands before its branch."""
    net = _Images(224, 3)
    net.conv("conv1", 64, 7, 2, 3)
    net.pool("maxpool", 3, 2, 1)
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            if block == 0:
                size, channels = net.size, net.channels
                net.conv(f"{name}.shortcut", 4 * width, 1, stride)
                net.size, net.channels = size, channels
            net.conv(f"{name}.conv1", width, 1)
            net.conv(f"{name}.conv2", width, 3, stride, 1)
            net.conv(f"{name}.conv3", 4 * width, 1)
    net.pool("avgpool", net.size, net.size)
    net.linear("fc", 1000)
    return net.layers


def gpt(*, blocks: int = 12, width: int = 768, heads: int = 12, tokens: int = 1024) -> list[LayerShape]:
    """The blocks of a GPT (Radford et al. 2019, by default the smallest GPT-2's), without embeddings: 85 million weights.
    Attention reads all tokens, so that its heads can be divided, but not those."""
    layers = []

    def linear(name: str, inputs: int, outputs: int) -> None:
        weights = outputs * (inputs + 1)
        layers.append(LayerShape(name, weights, tokens * inputs, tokens * outputs, outputs, tokens, tokens))

    for block in range(blocks):
        linear(f"block{block}.qkv", width, 3 * width)
        layers.append(LayerShape(f"block{block}.attention", 0, tokens * 3 * width, tokens * width, heads))
        linear(f"block{block}.projection", width, width)
        linear(f"block{block}.expand", width, 4 * width)
        linear(f"block{block}.contract", 4 * width, width)
    return layers


ARCHITECTURES: dict[str, Callable[[], list[LayerShape]]] = {"alexnet": alexnet, "resnet50": resnet50, "gpt": gpt}
