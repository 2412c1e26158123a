"""What a command line's budgets allow: limits on bits, bytes, bit operations and seconds, and the widths on offer."""

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from hawq.allocate import Budget, Products, Table, allocate
from hawq.allocation import ACTIVATION, Allocation
from hawq.cost.bops import FLOAT_BITS, bit_operations
from hawq.cost.latency import LatencyTable, latency_table
from hawq.cost.size import bits_of_weights, file_overhead, packed_bytes
from hawq.graph import Layer
from hawq.layers import QUANTIZERS
from hawq.model import quantize_model
from hawq.options import Options, UsageError
from hawq.widths import allowed_widths

DEFAULT_AVERAGE_BITS = 4.0  # where no budget is given


def offered(options: Options, table: Table) -> Table:
    """The table with the widths that the options offer each row; UsageError for globs and widths that fit no row."""
    widths: dict[str, Sequence[int]] = {"*": options.bits}
    try:
        return allowed_widths(table, widths | (options.layer_bits or {}))
    except ValueError as error:
        raise UsageError(f"--layer-bits: {error}") from error


def activation_sources(
    graph: fx.GraphModule, layers: Mapping[str, Layer], example: torch.Tensor
) -> tuple[list[str], dict[str, str]]:
    """The names of all activations that are rounded, and for each layer that of its input, where this is among them."""
    few = (example, torch.zeros(len(example)))
    everything = Allocation(dict.fromkeys(layers, 8))
    model = quantize_model(graph, everything, few, activations=8, bias_correction=False, range_method="min-max")
    sources = {name: source.removeprefix(f"{QUANTIZERS}.") for name, source in model.input_quantizers().items()}
    return list(model.quantizers()), sources


def latencies(options: Options, layers: Mapping[str, Layer], *, progress: bool = True) -> LatencyTable:
    """Seconds of each layer at each width offered, and at 8 bits."""
    widths = sorted({*options.offered_bits, 8})
    return latency_table(layers, widths, activations=8 if options.activations else None, progress=progress)


def budgets(
    options: Options, graph: fx.GraphModule, layers: Mapping[str, Layer], ties: Sequence[tuple[str, ...]], example: torch.Tensor
) -> list[Budget]:
    """The limits; UsageError, before any other work, where no widths can keep them together."""
    bits = options.offered_bits
    table = {name: dict.fromkeys(bits, 0.0) for name in layers}
    sources: dict[str, str] = {}
    if len(options.activations) > 1:
        names, sources = activation_sources(graph, layers, example)
        table |= {ACTIVATION + name: dict.fromkeys(options.activations, 0.0) for name in names}
    rows = offered(options, table)
    found = []
    average = options.avg_bits
    free = (options.max_size, options.max_bops, options.max_latency, options.max_drop)
    if average is None and all(limit is None for limit in free):
        average = DEFAULT_AVERAGE_BITS
    if average is not None:
        counts = {name: layer.num_params for name, layer in layers.items()}
        found.append(Budget("bits of weights", bits_of_weights(counts, bits), average * sum(counts.values())))
    if options.max_size is not None:
        found.append(_size(options, graph, layers, rows))
    if options.max_bops is not None:
        found.append(_bit_operations(options, layers, rows, sources))
    if options.max_latency is not None:
        found.append(_latency(options, layers, rows))
    try:
        allocate(rows, found, ties)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return found


def _size(options: Options, graph: fx.GraphModule, layers: Mapping[str, Layer], rows: Table) -> Budget:
    costs = packed_bytes(layers, options.offered_bits)
    overhead = file_overhead(graph, layers, options.activation_bits)
    smallest = overhead + int(sum(min(costs[name][bits] for bits in rows[name]) for name in layers))
    assert options.max_size is not None
    if options.max_size < smallest:
        raise UsageError(
            f"--max-size {options.max_size:,}: the smallest file has up to {smallest:,} bytes ({overhead:,} of "
            f"them beside the weights' codes), {smallest - options.max_size:,} more: raise it or add narrower --bits"
        )
    return Budget("bytes of weights", costs, options.max_size - overhead)


def _bit_operations(options: Options, layers: Mapping[str, Layer], rows: Table, sources: Mapping[str, str]) -> Budget:
    """Layers whose input has a width of its own cost products of two widths, the others by themselves."""
    assert options.max_bops is not None
    at_8_bits = sum(cost[8] for cost in bit_operations(layers, (8,), 8).values())
    width = FLOAT_BITS if len(options.activations) > 1 else options.activation_bits
    costs = bit_operations({name: layer for name, layer in layers.items() if name not in sources}, options.offered_bits, width)
    products: Products = {
        (name, ACTIVATION + source): {
            (weight, activation): float(weight * activation * layers[name].macs)
            for weight in rows[name]
            for activation in rows[ACTIVATION + source]
        }
        for name, source in sources.items()
    }
    budget = Budget("bit operations", costs, options.max_bops * at_8_bits, products)
    least = budget.used({name: min(row) for name, row in rows.items()}) / at_8_bits
    if options.max_bops < least:
        note = "" if options.activations else "; float activations count as 32 bits"
        raise UsageError(f"--max-bops {options.max_bops:g}: the widths offered need at least {least:.4g}{note}")
    return budget


def _latency(options: Options, layers: Mapping[str, Layer], rows: Table) -> Budget:
    assert options.max_latency is not None
    table = latencies(options, layers)
    at_8_bits = table if options.activations else latency_table(layers, (8,), activations=8, progress=True)
    limit = options.max_latency * at_8_bits.total(dict.fromkeys(layers, 8))
    least = sum(min(table[name][bits] for bits in rows[name]) for name in layers)
    if limit < least:
        shared = all(len({table[name][bits] for bits in rows[name]}) == 1 for name in layers)
        why = "all widths run on the same kernels here, so that none is faster" if shared else "no widths offered are faster"
        raise UsageError(
            f"--max-latency {options.max_latency:g}: the layers need at least {options.max_latency * least / limit:.4g} of "
            f"their time at 8 bits: {why}; raise it, or limit --max-size"
        )
    return Budget("seconds of layers", table, limit)
