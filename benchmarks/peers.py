"""Other libraries on our problems, each behind one function; None where a library is not installed."""

import contextlib
import importlib.util
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import nn

Batch = tuple[torch.Tensor, torch.Tensor]
Measure = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Found:
    """Eigenpairs as a peer returns them: values (k,) descending, vectors (P, k)."""

    values: np.ndarray
    vectors: torch.Tensor


def installed(name: str) -> bool:
    """Whether a peer can be imported."""
    return importlib.util.find_spec(name) is not None


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Peers print."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def curvlinops_eigenpairs(model: nn.Module, loss: nn.Module, batch: Batch, k: int) -> Found:
    """curvlinops' Hessian and SciPy's eigsh, to a tolerance of 1e-3."""
    from curvlinops import HessianLinearOperator

    operator = HessianLinearOperator(model, loss, list(model.parameters()), [batch])
    values, vectors = eigsh(operator.to_scipy(), k=k, which="LA", tol=1e-3)
    order = values.argsort()[::-1]
    return Found(values[order], torch.from_numpy(vectors[:, order].copy()))


def curvlinops_product(model: nn.Module, loss: nn.Module, batches: list[Batch]) -> "object":
    """The operator, without its check for determinism."""
    from curvlinops import HessianLinearOperator

    return HessianLinearOperator(model, loss, list(model.parameters()), batches, check_deterministic=False)


def eigenthings_eigenpairs(model: nn.Module, loss: nn.Module, batch: Batch, k: int) -> Found:
    """hessian-eigenthings' Lanczos with its defaults."""
    import hessian_eigenthings as peer

    operator = peer.HessianOperator(model, [batch], peer.supervised_loss(loss))
    found = peer.lanczos(operator, k=k, which="LA")
    values = found.eigenvalues.detach().cpu()
    vectors = found.eigenvectors.detach().cpu()
    vectors = vectors if vectors.shape[1] == k else vectors.T
    order = values.argsort(descending=True)
    return Found(values[order].numpy(), vectors[:, order])


def eigenthings_density(model: nn.Module, loss: nn.Module, batch: Batch, probes: int, steps: int, seed: int) -> Measure:
    """Nodes and weights of hessian-eigenthings' stochastic Lanczos quadrature."""
    import hessian_eigenthings as peer

    operator = peer.HessianOperator(model, [batch], peer.supervised_loss(loss))
    found = peer.spectral_density(operator, num_runs=probes, lanczos_steps=steps, seed=seed)
    return found.raw_eigenvalues.numpy().ravel(), found.raw_weights.numpy().ravel()


def pyhessian_eigenpairs(model: nn.Module, loss: nn.Module, batch: Batch, k: int) -> Found:
    """PyHessian's deflated power iteration with its defaults."""
    from pyhessian import hessian

    with silence():
        values, vectors = hessian(model, loss, data=batch, cuda=False).eigenvalues(top_n=k)
    flat = torch.stack([torch.cat([part.reshape(-1) for part in vector]) for vector in vectors], dim=1)
    return Found(np.array(values), flat.detach())
