r"""Per-example gradient norms of one parameter, from what the autograd graph already keeps.

A weight W of a linear or convolutional layer meets, in example n, the input patches X_n (K, P) and receives the output
gradients Y_n (O, P) at P positions. Its gradient is Y_n X_n^T, and

.. math:: \|Y_n X_n^T\|_F^2 = \langle Y_n (X_n^T X_n),\, Y_n \rangle,

the right-hand side being cheaper where positions are fewer than patch entries (the Gram form).
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import nn
from torch.autograd.graph import Node

from hessian.structure import WeightUse, operation

_PATCH_BYTES = 64 * 2**20  # patches unfolded at a time


def is_supported(use: WeightUse, parameter: nn.Parameter) -> bool:
    """Whether this file can read per-example gradients off this use of a parameter."""
    node = use.node
    if use.operation in ("Addmm", "Mm"):
        inputs = matrix_input(node)
        if inputs is None or inputs.layout is not torch.strided:
            return False
    match use.operation:
        case "Convolution" | "NativeBatchNorm":
            return use.slot in (1, 2)
        case "Addmm" if node._saved_alpha == 1 and node._saved_beta == 1:  # type: ignore[attr-defined]
            width = node._saved_mat2_sym_sizes[1]  # type: ignore[attr-defined]
            return use.slot == 2 or (use.slot == 0 and parameter.shape == (width,))
        case "Mm":
            return use.slot == 1
    return False


@torch.no_grad()
def squared_gradient_norms(
    use: WeightUse, parameter: nn.Parameter, gradients: Sequence[torch.Tensor], num_examples: int
) -> torch.Tensor:
    """|d(c)/d(parameter)|^2 for each cotangent c and example, shape (len(gradients), num_examples), float64.

    `gradients`: for each cotangent, the gradient at the output of `use.node`; its first dimension is a multiple of
    `num_examples`, example after example.
    """
    node, kind = use.node, use.operation
    if is_vector(use):
        return torch.stack([vector_gradients(use, gradient, num_examples).double().square().sum(1) for gradient in gradients])
    if kind == "Convolution":
        return _convolution_norms(node, parameter, gradients, num_examples)
    inputs = matrix_input(node)
    assert inputs is not None
    patches = inputs.unflatten(0, (num_examples, -1)).transpose(1, 2).unsqueeze(1)  # (N, 1, K, P)
    outputs = torch.stack([gradient.unflatten(0, (num_examples, -1)).transpose(1, 2) for gradient in gradients], 1)
    return _product_norms(patches, outputs.unsqueeze(1))


def is_vector(use: WeightUse) -> bool:
    """Whether a supported use is that of a bias, or of a batch norm's scale or shift; of a weight otherwise."""
    return use.operation == "NativeBatchNorm" or use.slot == (2 if use.operation == "Convolution" else 0)


def vector_gradients(use: WeightUse, gradient: torch.Tensor, num_examples: int) -> torch.Tensor:
    """Per-example gradients (num_examples, D) of a vector of D elements, from one gradient at the output of `use.node`.

    Those of a bias or shift are sums over positions. A batch norm must use its running statistics.
    """
    node = use.node
    if use.operation == "NativeBatchNorm" and use.slot == 1:
        shape = (1, -1) + (1,) * (gradient.dim() - 2)
        mean, variance = node._saved_running_mean, node._saved_running_var  # type: ignore[attr-defined]
        deviation = (variance + node._saved_eps).sqrt()  # type: ignore[attr-defined]
        gradient = gradient * (node._saved_input - mean.view(shape)) / deviation.view(shape)  # type: ignore[attr-defined]
    summed = gradient.flatten(2).sum(2) if gradient.dim() > 2 else gradient
    return summed.unflatten(0, (num_examples, -1)).sum(1)


def matrix_input(node: Node) -> torch.Tensor | None:
    """What a matrix product multiplies its weight by; None where it is not kept, because the weight needs no gradient."""
    saved: torch.Tensor | None = (
        node._saved_mat1 if operation(node) == "Addmm" else node._saved_self  # type: ignore[attr-defined]
    )
    return saved


def _convolution_norms(node: Node, weight: nn.Parameter, gradients: Sequence[torch.Tensor], num_examples: int) -> torch.Tensor:
    inputs, groups = node._saved_input, node._saved_groups  # type: ignore[attr-defined]
    transposed = node._saved_transposed  # type: ignore[attr-defined]
    kernel = tuple(weight.shape[2:])
    unfolded = gradients[0] if transposed else inputs
    positions = tuple((inputs if transposed else gradients[0]).shape[2:])
    settings = (positions, node._saved_stride, node._saved_padding, node._saved_dilation)  # type: ignore[attr-defined]
    per_row = unfolded.shape[1] * prod(kernel) * prod(positions) * unfolded.element_size()
    repeats = inputs.shape[0] // num_examples
    step = max(1, _PATCH_BYTES // (per_row * repeats))
    norms = []
    for start in range(0, num_examples, step):
        rows = slice(start * repeats, (start + step) * repeats)
        if transposed:  # the roles of input and output gradient are exchanged
            pieces = [
                _product_norms(
                    by_example(unfold_patches(gradient[rows], kernel, *settings, groups), repeats),
                    by_example(by_position(inputs[rows], groups), repeats).unsqueeze(2),
                )
                for gradient in gradients
            ]
            norms.append(torch.cat(pieces))
            continue
        patches = by_example(unfold_patches(inputs[rows], kernel, *settings, groups), repeats)
        outputs = [by_example(by_position(gradient[rows], groups), repeats) for gradient in gradients]
        norms.append(_product_norms(patches, torch.stack(outputs, dim=2)))
    return torch.cat(norms, dim=1)


def by_position(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """(N, G * C, *spatial) as (N, G, C, P)."""
    return tensor.flatten(2).unflatten(1, (groups, -1))


def unfold_patches(
    inputs: torch.Tensor,
    kernel: tuple[int, ...],
    out: tuple[int, ...],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """What each of `out` positions of a convolution sees: (N, G, K, P), in any number of spatial dimensions."""
    padded = nn.functional.pad(inputs, [amount for amount in reversed(padding) for _ in range(2)]).contiguous()
    size, channels = padded.shape[0], padded.shape[1] // groups
    by_row, by_channel, *by_space = padded.stride()
    view = padded.as_strided(
        (size, groups, channels, *kernel, *out),
        (
            by_row,
            by_channel * channels,
            by_channel,
            *(space * spread for space, spread in zip(by_space, dilation, strict=True)),
            *(space * step for space, step in zip(by_space, stride, strict=True)),
        ),
    )
    return view.reshape(size, groups, channels * prod(kernel), prod(out))


def by_example(tensor: torch.Tensor, repeats: int) -> torch.Tensor:
    """(N * repeats, G, C, P) as (N, G, C, repeats * P)."""
    if repeats == 1:
        return tensor
    return tensor.unflatten(0, (-1, repeats)).permute(0, 2, 3, 1, 4).flatten(3)


def _product_norms(patches: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """|Y_cn X_n^T|^2 summed over groups: patches (N, G, K, P), outputs (N, G, C, O, P), result (C, N)."""
    cotangents = outputs.shape[2]
    stacked = outputs.flatten(2, 3)  # (N, G, C * O, P)
    if patches.shape[3] < patches.shape[2]:
        gram = patches.transpose(2, 3) @ patches
        squares = ((stacked @ gram) * stacked).sum(3, dtype=torch.float64)
    else:
        squares = (stacked @ patches.transpose(2, 3)).square().sum(3, dtype=torch.float64)
    return squares.unflatten(2, (cotangents, -1)).sum(dim=(1, 3)).T
