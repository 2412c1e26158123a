"""Bars of work that may end early: full when it is done, and not before."""

import re

import pytest
import torch
import tqdm.notebook
from torch import nn

import hessian
from hessian.progress import up_to


def frames(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What each bar showed last, by its description."""
    shown = [text.split(": ", 1) for text in re.split(r"[\r\n]+", capsys.readouterr().err) if ": " in text]
    return {name: rest.strip() for name, rest in shown}


def test_a_bar_ends_full_unless_the_work_fails(capsys):
    with up_to(10, "early", "step", progress=True) as bar:
        bar.update(3)
    with up_to(10, "resumed", "step", initial=2, progress=True) as bar:
        bar.update(4)
    with up_to(10, "hidden", "step", progress=False) as bar:
        bar.update(3)
    with pytest.raises(TypeError), up_to(10, "failing", "step", initial=3, progress=True) as bar:
        bar.update("no number")
    found = frames(capsys)
    assert found.keys() == {"early", "resumed", "failing"}
    for name, share, counts in (("early", "100%", "3/3"), ("resumed", "100%", "6/6"), ("failing", "30%", "3/10")):
        assert found[name].startswith(f"{share}|")
        assert f"| {counts} [" in found[name]


def test_a_notebooks_bar_is_full_too(monkeypatch):
    pytest.importorskip("ipywidgets")
    monkeypatch.setattr(tqdm.notebook, "display", lambda *_: None)
    monkeypatch.setattr("hessian.progress.tqdm", tqdm.notebook.tqdm)
    with up_to(10, "early", "step", progress=True) as bar:
        bar.update(3)
    _, widget, _ = bar.container.children
    assert (widget.value, widget.max, widget.bar_style) == (3, 3, "success")


def test_the_bars_of_estimators_that_stop_early(capsys):
    generator = torch.Generator().manual_seed(0)
    matrix = hessian.Dense(torch.diag(1 + torch.rand(200, generator=generator).double()))
    few = {"generator": generator, "progress": True}
    assert hessian.top_eigenpairs(matrix, tol=0.1, **few).num_matvecs < 120
    assert hessian.trace(matrix, rtol=0.5, method="hutchinson", **few).num_matvecs < 1000
    assert hessian.diagonal(matrix, rtol=0.9, method="hutchinson", **few).num_matvecs < 1000
    hessian.spectral_density(hessian.Dense(torch.eye(200).double()), 3, 20, **few)
    x, y = torch.randn(8, 4, generator=generator), torch.randint(0, 3, (8,), generator=generator)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    hessian.layer_report(model, nn.CrossEntropyLoss(), (x, y), method="hutchinson", rtol=10.0, **few)
    found = frames(capsys)
    assert found.keys() == {"eigenvalues", "trace", "diagonal", "Lanczos quadrature", "probes"}
    assert all(rest.startswith("100%") for rest in found.values()), found
    hessian.activation_report(model, nn.CrossEntropyLoss(), (x, y), rtol=10.0, **few)
    assert frames(capsys)["probes"].startswith("100%")
