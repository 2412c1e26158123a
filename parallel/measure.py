"""Alpha and beta of the running process group, by timing all-reduces of many sizes."""

import statistics
import time

import numpy as np
import torch
from scipy.optimize import nnls
from torch import distributed
from tqdm.auto import tqdm

from parallel.communication import AlphaBeta

_SIZES = tuple(2**power for power in range(8, 25, 2))  # bytes, 256 to 16 million
_REPEATS = 7


def measure(device: torch.device | str = "cpu", *, progress: bool = False) -> AlphaBeta:
    """The alpha and beta that explain the medians of all-reduces best, in relative terms; the same on every rank.

    Collective: every rank of the default group must call it. ValueError for a group of one, which sends nothing.
    """
    ranks = distributed.get_world_size()
    if ranks < 2:
        raise ValueError("one process sends nothing that could be measured: run under torchrun with 2 or more")
    rows, seconds = [], []
    for size in tqdm(_SIZES, desc="all-reduce", unit="size", disable=not progress or distributed.get_rank() > 0):
        values = torch.zeros(size // 4, device=device)
        took = []
        for _ in range(_REPEATS + 1):
            distributed.barrier()
            start = time.perf_counter()
            distributed.all_reduce(values)
            if values.is_cuda:
                torch.cuda.synchronize(values.device)
            took.append(time.perf_counter() - start)
        slowest = torch.tensor(statistics.median(took[1:]), dtype=torch.float64, device=device)  # the first one warms up
        distributed.all_reduce(slowest, distributed.ReduceOp.MAX)
        seconds.append(float(slowest))
        rows.append([AlphaBeta(1.0, 0.0).all_reduce(size, ranks), AlphaBeta(0.0, 1.0).all_reduce(size, ranks)])
    return fit(np.array(rows), np.array(seconds))


def fit(rows: np.ndarray, seconds: np.ndarray) -> AlphaBeta:
    """Least squares of rows @ (alpha, beta) = seconds in relative terms, neither below 0. rows: (messages, 2)."""
    scaled = rows / seconds[:, None]
    units = scaled.max(0)
    solution, _ = nnls(scaled / units, np.ones(len(seconds)))
    alpha, beta = solution / units
    return AlphaBeta(float(alpha), float(beta))
