"""The sensitivity table: what each width of each layer is expected to cost, with standard errors."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from tqdm.auto import tqdm

from hawq.affine import dequantize, per_channel
from hawq.graph import Layer, get_tensor
from hawq.rounding import round_to_nearest

Errors = Mapping[str, Mapping[int, float]]


class SensitivityTable(Mapping[str, Mapping[int, float]]):
    """omega by layer and bits; `stderr` likewise; `method` that made it."""

    def __init__(self, omega: Errors, stderr: Errors, method: str) -> None:
        self._omega = {name: dict(row) for name, row in omega.items()}
        self.stderr = {name: dict(row) for name, row in stderr.items()}
        self.method = method

    def __getitem__(self, layer: str) -> dict[int, float]:
        return self._omega[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._omega)

    def __len__(self) -> int:
        return len(self._omega)

    def __repr__(self) -> str:
        return f"SensitivityTable({self._omega!r}, method={self.method!r})"


def rounding_errors(
    graph: torch.fx.GraphModule, layers: Mapping[str, Layer], bits: Sequence[int], *, progress: bool = False
) -> dict[str, dict[int, float]]:
    """The squared Euclidean norm of each layer's rounding error at each width, rounded to nearest."""
    errors: dict[str, dict[int, float]] = {}
    for name, layer in tqdm(layers.items(), desc="rounding errors", unit="layer", disable=not progress):
        weight = get_tensor(graph, layer.weight).detach()
        errors[name] = {}
        for width in bits:
            codes, scale = round_to_nearest(weight, width)
            difference = dequantize(codes, per_channel(scale, weight)) - weight
            errors[name][width] = float(difference.double().square().sum())
    return errors
