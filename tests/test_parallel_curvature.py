"""Curvature of split data on several ranks against one process, in float64."""

from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import hessian
from hessian import landscape
from hessian.__main__ import analyse
from hessian.processes import Processes
from hessian.report_options import Options
from parallel import curvature
from parallel.layouts.batch_norm import globalize
from tests.ranks import run_on_ranks

IGNORED = nn.CrossEntropyLoss(ignore_index=1)


def problem():
    """A curved and a piecewise linear network, and 11 examples of which some do not count."""
    torch.manual_seed(0)
    smooth = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    linear = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).double()
    x = torch.randn(11, 5, dtype=torch.float64)
    images = torch.randn(11, 1, 3, 3, dtype=torch.float64)
    return smooth, linear, x, images, torch.tensor([0, 1, 2, 2, 1, 1, 0, 2, 0, 1, 2])


def part(*tensors):
    """This rank's share: the first takes 5 examples, in two batches, the next 4, the next 2, a fourth none."""
    start, end = [(0, 5), (5, 9), (9, 11), (11, 11)][distributed.get_rank()] if distributed.get_world_size() > 1 else (0, 11)
    own = [tensor[start:end] for tensor in tensors]
    return list(zip(*(tensor.split(3) for tensor in own), strict=True)) if start < end else []


def estimates(operator):
    """What an estimator makes of the operator, by generators of one seed."""

    def generator():
        return torch.Generator().manual_seed(3)

    top = hessian.top_eigenpairs(operator, 3, which="both", tol=1e-8, generator=generator())
    density = hessian.spectral_density(operator, 2, 12, generator=generator())
    layers = [
        hessian.layer_report(operator.objective, eigenvalues=True, generator=generator()),
        hessian.layer_report(operator.objective, method="hutchinson", max_probes=32, channels=True, generator=generator()),
    ]
    line = landscape.line(operator.objective, direction=top.vectors[:, 0], num_points=5)
    return [
        torch.tensor([[row.trace, row.trace_stderr] for report in layers for row in report.values()], dtype=torch.float64),
        torch.tensor([row.top_eigenvalue for row in layers[0].values()], dtype=torch.float64),
        torch.as_tensor(line.losses),
        torch.tensor(float(hessian.verify(operator, generator=generator()).ok)),
        operator.to_dense(),
        operator.gradient(),
        torch.tensor(operator.loss_and_gradient()[0], dtype=torch.float64),
        top.values,
        torch.tensor(
            hessian.trace(operator, method="hutchinson", max_matvecs=40, generator=generator()).value, dtype=torch.float64
        ),
        torch.tensor(hessian.trace(operator, generator=generator()).value, dtype=torch.float64),
        hessian.diagonal(operator, generator=generator()).value,
        density.nodes,
        density.weights,
        operator.block("0.*").to_dense(),
    ]


def distributed_estimates():
    smooth, linear, x, images, targets = problem()
    wrapped = DistributedDataParallel(smooth)
    # rank 0's vectors are those of all, whatever the others' generators
    torch.manual_seed(distributed.get_rank())
    own = curvature.hessian(smooth, IGNORED, part(x, targets))
    return [
        estimates(curvature.hessian(wrapped, IGNORED, part(x, targets))),
        estimates(curvature.gauss_newton(smooth, IGNORED, part(x, targets), micro_batch=2)),
        estimates(curvature.hessian(linear, IGNORED, part(images, targets))),
        [own.space.random(2, kind) for kind in ("rademacher", "normal")],
    ]


def normalised(groups=1):
    """Two batches of a network with batch norm in training mode, shared 4 to 3 and 1 to 3 by two ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    _, _, _, x, targets = problem()
    batches = [(x[:7], targets[:7]), (x[7:], targets[7:])]
    if groups == 1:
        return model, batches
    globalize(model, None)
    rank = distributed.get_rank()
    cuts = [[slice(0, 4), slice(4, 7)], [slice(0, 1), slice(1, 4)]]
    return model, [tuple(tensor[cut[rank]] for tensor in batch) for batch, cut in zip(batches, cuts, strict=True)]


def normalised_curvature():
    model, batches = normalised(2)
    found = []
    for make in (curvature.hessian, curvature.gauss_newton):
        operator = make(model, nn.CrossEntropyLoss(), batches)
        found.append((operator.to_dense(), operator.gradient(), torch.tensor(operator.loss_and_gradient()[0]).double()))
    with pytest.raises(ValueError, match="give all as many"):
        curvature.hessian(model, nn.CrossEntropyLoss(), batches[distributed.get_rank() :])
    return found


def test_a_global_batch_norm_in_training_mode():
    model, batches = normalised()
    for rank in run_on_ranks(normalised_curvature, 2):
        for make, found in zip((hessian.Hessian, hessian.GaussNewton), rank, strict=True):
            operator = make(model, nn.CrossEntropyLoss(), batches)
            expected = (operator.to_dense(), operator.gradient(), torch.tensor(operator.loss_and_gradient()[0]).double())
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.nightly), 4])
def test_estimates_equal_those_of_one_process(ranks):
    """With 2 ranks the last two examples are left out on both sides; with 4 one rank has none."""
    smooth, linear, x, images, targets = problem()
    count = 9 if ranks == 2 else 11
    data, pictures = (x[:count], targets[:count]), (images[:count], targets[:count])
    expected = [
        estimates(hessian.Hessian(smooth, IGNORED, data)),
        estimates(hessian.GaussNewton(smooth, IGNORED, data)),
        estimates(hessian.Hessian(linear, IGNORED, pictures)),
    ]
    results = run_on_ranks(distributed_estimates, ranks)
    for found, truth in zip(results[0], expected, strict=False):
        for one, other in zip(found, truth, strict=True):
            assert float((one - other).abs().max()) < 1e-10 * max(1.0, float(other.abs().max()))
    for result in results[1:]:
        assert all(
            torch.equal(one, other) for left, right in zip(results[0], result, strict=True) for one, other in zip(left, right)
        )


def sharded_model(kind):
    """The smooth network, sharded, and this rank's data."""
    smooth, _, x, _, targets = problem()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    if kind == "fsdp":
        for module in (smooth[0], smooth):
            fully_shard(module, mesh=mesh)
        return smooth, part(x, targets)
    if kind == "tensor":
        return parallelize_module(smooth, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()}), (x[:9], targets[:9])
    return smooth, part(x, targets)


def estimates_in_parts(operator):
    """As those of `estimates`, of an operator whose vectors may be in parts, gathered."""

    def generator():
        return torch.Generator().manual_seed(3)

    top = hessian.top_eigenpairs(operator, 3, which="both", tol=1e-8, generator=generator())
    density = hessian.spectral_density(operator, 2, 12, generator=generator())
    trace = hessian.trace(operator, method="hutchinson", max_matvecs=40, generator=generator())
    first = top.full_vectors()[:, 0]
    return [
        operator.to_dense(),
        operator.space.whole(operator.gradient()[None])[0],
        top.values,
        torch.outer(first, first),
        density.nodes,
        density.weights,
        torch.tensor(trace.value, dtype=torch.float64),
        operator.block("2.*").to_dense(),
        torch.tensor(float(hessian.verify(operator, generator=generator()).ok)),
    ]


def sharded_estimates():
    found = []
    for kind in ("fsdp", "tensor", "plain"):
        model, data = sharded_model(kind)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for make in (curvature.hessian, curvature.gauss_newton):
            operator = make(model, IGNORED, data, **({"shard_vectors": True} if kind == "plain" else {}))
            assert operator.space.local_size < operator.shape[0]
            found.append(estimates_in_parts(operator))
        assert all(bool((old == new).all()) for old, new in zip(before, model.parameters(), strict=True))
    return found


def test_sharded_models_and_vectors():
    """FSDP2, tensor parallel and plain with sharded vectors, against one process; sizes that do not divide evenly."""
    smooth, _, x, _, targets = problem()
    data = (x[:9], targets[:9])
    expected = [estimates_in_parts(kind(smooth, IGNORED, data)) for kind in (hessian.Hessian, hessian.GaussNewton)]
    for found in run_on_ranks(sharded_estimates, 2):
        for number, values in enumerate(found):
            for one, other in zip(values, expected[number % 2], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def stepped():
    """The product of an FSDP2 model after a step of its optimizer."""
    model, data = sharded_model("fsdp")
    operator = curvature.hessian(model, IGNORED, data)
    before = operator.to_dense()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    x, targets = data[0]
    (IGNORED(model(x), targets) * len(x)).backward()
    optimizer.step()
    again = curvature.hessian(model, IGNORED, data).to_dense()
    return before, operator.to_dense(), again


def test_products_see_the_parameters_as_they_are():
    for before, after, again in run_on_ranks(stepped, 2):
        assert torch.equal(after, again)
        assert not torch.allclose(before, after)


def test_one_process_needs_no_group():
    smooth, _, x, _, targets = problem()
    found = curvature.hessian(smooth, IGNORED, (x, targets)).to_dense()
    assert torch.equal(found, hessian.Hessian(smooth, IGNORED, (x, targets)).to_dense())


def reductions():
    """How many reductions a block of products takes."""
    smooth, _, x, _, targets = problem()
    operator = curvature.hessian(smooth, IGNORED, part(x, targets))
    vectors = torch.ones(operator.shape[0], 4, dtype=torch.float64)
    operator @ vectors
    calls = []
    original = distributed.all_reduce
    distributed.all_reduce = lambda *arguments, **options: calls.append(1) or original(*arguments, **options)
    try:
        operator @ vectors
    finally:
        distributed.all_reduce = original
    return len(calls)


def test_one_reduction_a_block_of_products():
    assert run_on_ranks(reductions, 2) == [1, 1]


def failures():
    """An error on one rank is raised on all, and the next call works."""
    smooth, _, x, _, targets = problem()
    rank, found = distributed.get_rank(), []
    bad = targets.clone()
    bad[7] = 9  # in rank 1's part
    for attempt in (
        lambda: curvature.hessian(smooth, IGNORED, part(x, bad)) @ torch.zeros(57, dtype=torch.float64),
        lambda: curvature.hessian(smooth, nn.CrossEntropyLoss(ignore_index=-1), [(x[:0], targets[:0])]),
        lambda: curvature.hessian(smooth, IGNORED, part(x, targets)).exact_trace(),
    ):
        try:
            attempt()
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    curvature.hessian(smooth, IGNORED, part(x, targets)) @ torch.zeros(57, dtype=torch.float64)
    return rank, found


def test_errors_reach_every_rank():
    (_, first), (_, second) = run_on_ranks(failures, 2)
    assert first[0] == "RuntimeError: the computation failed on another rank, whose own message says why"
    assert second[0].startswith("DataMismatchError: target 9 is out of range")
    assert first[1].startswith("ValueError: no item of the data counts on any rank")
    assert first[2].startswith("NotExactError: the trace of '0.weight' is not exact")
    assert first[1:] == second[1:]


def report(weights, rank=0, ranks=1):
    options = Options(
        "digits-mobilenet", Path("unused"), weights, 5, eigenvalues=1, probes=1, steps=4, layers=False, landscape=False
    )
    return analyse(options, Processes(rank, ranks, torch.device("cpu"), HashStore(), 0)).to_dict()


def report_on_ranks(weights):
    return report(weights, distributed.get_rank(), distributed.get_world_size())


@pytest.mark.nightly
def test_the_command_line_divides_the_examples(tmp_path):
    """python -m hessian under torchrun: five examples on two ranks, float32."""
    weights = tmp_path / "initial.pt"
    torch.save(hessian.load_task("digits-mobilenet", pretrained=False).model.state_dict(), weights)
    expected = report(weights)
    first, second = run_on_ranks(report_on_ranks, 2, weights)
    assert first | {"seconds": {}} == second | {"seconds": {}}
    for name in ("loss", "gradient_norm"):
        assert first[name] == pytest.approx(expected[name], rel=1e-5)
    assert first["eigenvalues"]["values"] == pytest.approx(expected["eigenvalues"]["values"], rel=1e-4)
    assert first["spectrum"]["nodes"][0] == pytest.approx(expected["spectrum"]["nodes"][0], rel=1e-2, abs=1e-3)
    traces = {row["name"]: row["trace"] for row in expected["layers"]}
    assert {row["name"]: row["trace"] for row in first["layers"]} == pytest.approx(traces, rel=1e-4, abs=1e-9)
