r"""What a layer sends in each layout, on a grid of Pr x Pc ranks (Gholami et al., SPAA 2018, sections 2 and 3).

The Pc groups share the batch. Within a group of Pr ranks a layer is laid out by

- batch: every rank has B / (Pr Pc) examples and all weights;
- model: every rank has 1 / Pr of the output channels and sees all B / Pc examples: the outputs are gathered, the gradients of
  the inputs summed (the 1.5-D algorithm, equation 8);
- domain: every rank has 1 / Pr of the image's rows of B / Pc examples, and borrows floor(k / 2) rows of its neighbours.

Gradients of the weights are summed over all ranks that have a copy. Layers in different layouts need a re-layout between
them, which the paper leaves out: activations forward, their gradients backward.
"""

from dataclasses import dataclass
from typing import Literal

from parallel.communication import Collective
from parallel.layer_shape import LayerShape

Layout = Literal["batch", "model", "domain"]
LAYOUTS: tuple[Layout, ...] = ("batch", "model", "domain")

VALUE_BYTES = 4
_WEIGHT_COPIES = 3  # the weight, its gradient and a momentum


@dataclass(frozen=True)
class Grid:
    """Pr ranks that share a model or an image, times Pc groups that share the batch."""

    model: int
    batch: int

    @property
    def ranks(self) -> int:
        return self.model * self.batch


def obstacle(layer: LayerShape, layout: Layout, grid: Grid, batch_size: int) -> str:
    """Why this layer cannot be laid out so; empty where it can."""
    parts = grid.ranks if layout == "batch" else grid.batch
    if parts > batch_size:
        return f"a batch of {batch_size} cannot be divided among {parts}"
    if layout == "model" and layer.channels and layer.channels < grid.model:
        return f"{layer.name!r} has {layer.channels} channels for {grid.model} ranks"
    if layout == "domain" and grid.model > 1:
        rows = min(layer.rows_in, layer.rows_out)
        if rows < grid.model:
            return f"{layer.name!r} has {rows} rows for {grid.model} ranks"
        if layer.kernel_rows // 2 > layer.rows_in // grid.model:
            return f"{layer.name!r} needs {layer.kernel_rows // 2} rows of a neighbour that has {layer.rows_in // grid.model}"
    return ""


def traffic(layer: LayerShape, layout: Layout, grid: Grid, batch_size: int, *, first: bool) -> list[Collective]:
    """What each rank sends for the layer in a step. first: nobody needs the gradient of its inputs."""
    examples = -(-batch_size // grid.batch)
    weights, sharers, found = layer.weights, grid.ranks, []
    if layout == "model":
        sharers = grid.batch
        if layer.channels:
            weights = -(-weights // grid.model)
            found.append(Collective("all-gather", "outputs", grid.model, VALUE_BYTES * examples * layer.outputs))
            if not first:
                found.append(Collective("all-reduce", "input gradients", grid.model, VALUE_BYTES * examples * layer.inputs))
    if layout == "domain" and layer.halo_values:
        halo = VALUE_BYTES * examples * layer.halo_values
        found.append(Collective("halo", "rows of inputs", grid.model, halo))
        if not first:
            found.append(Collective("halo", "gradients of these rows", grid.model, halo))
    if weights:
        found.append(Collective("all-reduce", "weight gradients", sharers, VALUE_BYTES * weights))
    return [collective for collective in found if collective.ranks > 1]


def relayout(before: Layout, after: Layout, values: int, grid: Grid, batch_size: int) -> list[Collective]:
    """What each rank sends so that `values` an example that one layer left in a layout, and their gradients on the way back,
    are where the next one's needs them. Behind a model-parallel layer every rank of a group has all of its examples."""
    if before == after or grid.model == 1:
        return []
    whole = VALUE_BYTES * -(-batch_size // grid.batch) * values
    if before == "model":
        return [Collective("all-gather", "gradients to re-lay", grid.model, whole)]
    if after == "model":
        return [Collective("all-gather", "activations to re-lay", grid.model, whole)]
    kinds = ("activations to re-lay", "gradients to re-lay")
    return [Collective("all-to-all", kind, grid.model, whole / grid.model) for kind in kinds]


def memory(layer: LayerShape, layout: Layout, grid: Grid, batch_size: int) -> float:
    """Bytes that a rank keeps for the layer: weights, gradients, a momentum, and the inputs for the backward pass."""
    examples = -(-batch_size // grid.batch)
    weights = layer.weights / grid.model if layout == "model" and layer.channels else layer.weights
    inputs = float(examples * layer.inputs)
    if layout == "batch":
        inputs = float(-(-batch_size // grid.ranks) * layer.inputs)
    elif layout == "domain":
        inputs = examples * (layer.inputs / grid.model + (2 * layer.halo_values if grid.model > 1 else 0))
    return VALUE_BYTES * (_WEIGHT_COPIES * weights + inputs)
