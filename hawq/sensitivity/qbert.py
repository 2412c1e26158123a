r"""Q-BERT: how large the top eigenvalue is, and how much it varies with the data (Shen et al. 2020, equation 2).

.. math:: \Omega_i = |\mathrm{mean}(\lambda_i)| + \mathrm{std}(\lambda_i), \qquad
          \Omega_i(b) = \frac{\Omega_i}{n_i} \, \|Q_b(W_i) - W_i\|_2^2

with lambda_i the top eigenvalues over tenths of the data. The paper orders layers of one size by Omega; dividing by the size
and weighing the rounding error, as HAWQ-V1 does, makes it a table for layers of any.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from hawq.graph import Layer
from hawq.sensitivity.table import Errors, SensitivityTable
from hawq.sensitivity.top_eigenvalue import top_eigenvalues
from hessian.batch import count_examples, map_tensors
from hessian.objective import Objective

SUBSAMPLES = 10


def subsampled_eigenvalues(
    objective: Objective,
    layers: Mapping[str, Layer],
    *,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> dict[str, torch.Tensor]:
    """Each layer's top eigenvalue over each tenth of the data, drawn at random: (10,), fewer for less than 10 examples.

    Processes that hold data share the tenths.
    """
    seed = objective.seed(generator)
    tenths = list(_tenths(list(objective.whole_batches()), torch.Generator().manual_seed(seed)))

    def eigenvalues(numbered: tuple[int, list[Any]]) -> dict[str, float]:
        number, part = numbered
        own = torch.Generator().manual_seed(seed + 1 + number)
        tops = top_eigenvalues(Objective(objective.model, objective.loss, part), layers, generator=own)
        return {name: top.value for name, top in tops.items()}

    bar = tqdm(list(enumerate(tenths)), desc="subsamples", unit="subsample", disable=not progress)
    found = objective.each(eigenvalues, bar)
    return {name: torch.tensor([values[name] for values in found], dtype=torch.float64) for name in layers}


def _tenths(batches: Sequence[Any], generator: torch.Generator) -> Iterator[list[Any]]:
    """Disjoint random subsamples of equal size, each in the same batches as the data."""
    counts = [count_examples(batch) for batch in batches]
    total = sum(counts)
    if total < 2:
        raise ValueError(f"q-bert compares subsamples of the data, and there is {total} example: pass more data")
    owners = torch.randperm(total, generator=generator) % min(SUBSAMPLES, total)
    for number in range(min(SUBSAMPLES, total)):
        part = []
        for batch, count, owner in zip(batches, counts, owners.split(counts), strict=True):
            rows = (owner == number).nonzero().squeeze(1)
            if len(rows):
                part.append(map_tensors(partial(_chosen, count=count, rows=rows), batch))
        yield part


def _chosen(tensor: torch.Tensor, *, count: int, rows: torch.Tensor) -> torch.Tensor:
    return tensor[rows.to(tensor.device)] if tensor.dim() and len(tensor) == count else tensor


def qbert(layers: Mapping[str, Layer], errors: Errors, eigenvalues: Mapping[str, torch.Tensor]) -> SensitivityTable:
    """The table; the standard error of |mean| + std is the jackknife's over the subsamples."""
    omega, stderr = {}, {}
    for name, layer in layers.items():
        values = eigenvalues[name]
        one_left_out = [_statistic(torch.cat([values[:index], values[index + 1 :]])) for index in range(len(values))]
        spread = float(torch.stack(one_left_out).var(correction=0) * (len(values) - 1)) ** 0.5
        size = float(_statistic(values))
        omega[name] = {bits: size / layer.num_params * error for bits, error in errors[name].items()}
        stderr[name] = {bits: spread / layer.num_params * error for bits, error in errors[name].items()}
    return SensitivityTable(omega, stderr, "q-bert")


def _statistic(values: torch.Tensor) -> torch.Tensor:
    return values.mean().abs() + values.std(correction=0)
