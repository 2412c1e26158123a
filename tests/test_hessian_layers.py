"""Layer traces: exact ones against dense float64 blocks, sampled ones within their own standard error."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hessian
from hessian.results import LayerReport
from tests.cases import ConvNet, SequenceNet, SmoothNet, classification, seeded
from tests.oracles import assert_unchanged, snapshot, true_traces

LOSSES = {
    "cross-entropy": nn.CrossEntropyLoss(),
    "label smoothing": nn.CrossEntropyLoss(label_smoothing=0.2),
    "class weights": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)),
    "ignore_index": nn.CrossEntropyLoss(ignore_index=1),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "squared": lambda outputs, targets: (outputs - F.one_hot(targets, 3)).square().mean(),
    "not convex in the outputs": lambda outputs, targets: (outputs * F.one_hot(targets, 3)).tanh().square().mean(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize(("build", "shape"), [(ConvNet, (6, 1, 9, 7)), (SequenceNet, (6, 8, 3))], ids=["cnn", "sequence"])
def test_exact_traces_equal_the_dense_blocks(build, shape, loss):
    model, data = seeded(build), classification(*shape)
    report = hessian.layer_report(model, loss, data, method="exact")
    expected = true_traces(model, loss, data, report)
    assert set(report) == {name for name, _ in model.named_parameters()}
    for name, row in report.items():
        assert row.exact
        assert row.trace_stderr == 0.0
        assert row.trace == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name


def test_ragged_batches_give_the_same_traces():
    model, data, loss = seeded(ConvNet), classification(7, 1, 8, 8), nn.CrossEntropyLoss()
    whole = hessian.layer_report(model, loss, data, method="exact")
    batches = [(data[0][:5], data[1][:5]), (data[0][5:], data[1][5:])]
    parts = hessian.layer_report(model, loss, batches, method="exact")
    for name in whole:
        assert parts[name].trace == pytest.approx(whole[name].trace, rel=1e-9)


def test_curved_parameters_are_sampled_and_the_others_exact():
    model, data, loss = seeded(SmoothNet), classification(8, 4), nn.CrossEntropyLoss()
    generator = torch.Generator().manual_seed(0)
    report = hessian.layer_report(model, loss, data, rtol=0.0, max_probes=512, generator=generator)
    expected = true_traces(model, loss, data, report)
    assert [name for name, row in report.items() if row.exact] == ["last.weight", "last.bias"]
    assert "Gelu is not linear" in report["norm.weight"].reason or "LayerNorm" in report["norm.weight"].reason
    assert report.num_matvecs == 512 + 8  # eight with the Gauss-Newton matrix, which did not help
    for name, row in report.items():
        if row.exact:
            assert row.trace == pytest.approx(expected[name], rel=1e-9)
        else:
            assert abs(row.trace - expected[name]) <= 4 * row.trace_stderr


def test_standard_errors_cover_the_truth_as_often_as_they_should():
    model, data, loss = seeded(SmoothNet), classification(8, 4), nn.CrossEntropyLoss()
    expected = true_traces(model, loss, data, [name for name, _ in model.named_parameters()])
    hits = dict.fromkeys(expected, 0)
    seeds = 100
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        report = hessian.layer_report(model, loss, data, method="hutchinson", rtol=0.0, max_probes=32, generator=generator)
        for name, row in report.items():
            hits[name] += abs(row.trace - expected[name]) <= 2.04 * row.trace_stderr  # t, 31 degrees of freedom, 95%
    for name, count in hits.items():
        assert count / seeds >= 0.88, name  # 95% give or take three binomial deviations and skewness


def test_sampling_stops_at_the_asked_error():
    model, data, loss = seeded(SmoothNet), classification(8, 4), nn.CrossEntropyLoss()
    generator = torch.Generator().manual_seed(3)
    report = hessian.layer_report(
        model, loss, data, "last.weight", method="hutchinson", rtol=0.1, max_probes=5000, generator=generator
    )
    row = report["last.weight"]
    assert row.trace_stderr <= 0.1 * row.trace
    assert report.num_matvecs < 5000


def test_with_many_outputs_labels_are_drawn_and_no_products_spent():
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 100)).double()
    data = classification(40, 3, classes=100)
    loss = nn.CrossEntropyLoss()
    report = hessian.layer_report(model, loss, data, rtol=0.02, generator=torch.Generator().manual_seed(0))
    assert report.num_matvecs == 0
    for name, row in report.items():
        assert not row.exact
        assert "more than 64 outputs an example" in row.reason
        truth = float(hessian.Hessian(model, loss, data, params=[name]).to_dense().trace())
        assert 0 < row.trace_stderr <= 0.02 * row.trace
        assert abs(row.trace - truth) < 4 * row.trace_stderr


def test_the_model_is_left_alone():
    model, data = seeded(ConvNet), classification(4, 1, 8, 8)
    model.stem.weight.requires_grad_(False)
    before, state = snapshot(model), torch.get_rng_state()
    hessian.layer_report(model, nn.CrossEntropyLoss(), data, "*weight")
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_reports_round_trip(tmp_path):
    report = hessian.layer_report(seeded(ConvNet), nn.CrossEntropyLoss(), classification(4, 1, 8, 8))
    report.save(tmp_path / "layers.json")
    loaded = LayerReport.load(tmp_path / "layers.json")
    assert dict(loaded) == dict(report)
    assert "stem.weight" in repr(report)
    assert report._repr_html_().count("<tr>") == len(report) + 1
    (tmp_path / "other.json").write_text('{"format": "something else", "version": 1}')
    with pytest.raises(ValueError, match="no layer report"):
        LayerReport.load(tmp_path / "other.json")


def test_traces_of_the_trained_network_equal_per_example_autograd(resnet20):
    """tr(G) = (1/N) sum_n sum_c p_nc |d log p_c / dW|^2, with one backward pass for every example and class."""
    images, targets = resnet20.train.tensors[0][:8], resnet20.train.tensors[1][:8]
    names = ["conv1.weight", "layer2.0.downsample.0.weight", "layer3.2.conv2.weight", "fc.weight"]
    report = hessian.layer_report(resnet20.model, resnet20.loss, (images, targets), names, method="exact")
    parameters = [dict(resnet20.model.named_parameters())[name] for name in names]
    expected = torch.zeros(len(names), dtype=torch.float64)
    for image in images:
        log_p = resnet20.model(image[None]).log_softmax(1)[0]
        for value in log_p:
            gradients = torch.autograd.grad(value, parameters, retain_graph=True)
            expected += value.exp().item() * torch.stack([g.double().square().sum() for g in gradients]) / len(images)
    for name, value in zip(names, expected.tolist(), strict=True):
        assert report[name].trace == pytest.approx(value, rel=1e-4)


class Fitted(SmoothNet):
    """Logits far apart, so that targets which agree with them leave a small loss and a Hessian near the Gauss-Newton matrix."""

    def forward(self, x):
        return 25 * super().forward(x)


@pytest.mark.nightly
@pytest.mark.parametrize("many", [False, True])
def test_the_gauss_newton_matrix_takes_the_spread_away(many, monkeypatch):
    if many:  # labels are drawn instead of one backward pass an output
        monkeypatch.setattr("hessian.estimators.exact_trace.MAX_OUTPUTS", 2)
    model, (inputs, _) = seeded(Fitted, 3), classification(40, 4)
    targets = model(inputs).argmax(1)
    loss, names = nn.CrossEntropyLoss(), ["first.weight", "first.bias"]
    expected = true_traces(model, loss, (inputs, targets), names)
    options = {"params": names, "rtol": 0.0, "max_probes": 64}
    plain = hessian.layer_report(model, loss, (inputs, targets), **options, method="hutchinson", generator=seed(0))
    smart = hessian.layer_report(model, loss, (inputs, targets), **options, generator=seed(0))
    for name in names:
        assert smart[name].trace_stderr < 0.6 * plain[name].trace_stderr
    hits = 0
    for number in range(40):
        report = hessian.layer_report(model, loss, (inputs, targets), **options, generator=seed(number))
        hits += sum(abs(report[name].trace - expected[name]) <= 1.96 * report[name].trace_stderr for name in names)
    assert hits >= 0.87 * 80  # 95%, less three binomial deviations of 40 pairs


def test_top_eigenvalues_equal_the_dense_blocks():
    model, data, loss = seeded(ConvNet), classification(6, 1, 8, 8), nn.CrossEntropyLoss()
    report = hessian.layer_report(model, loss, data, eigenvalues=True, generator=seed(0))
    for name, row in report.items():
        dense = torch.linalg.eigvalsh(hessian.Hessian(model, loss, data, name).to_dense())
        assert row.top_eigenvalue == pytest.approx(float(dense[-1]), rel=1e-5, abs=1e-12), name
        assert row.residual <= 1.01e-3 * float(dense.abs().max()), name
    assert report.header()[-2:] == ["top eigenvalue", "residual"]


@pytest.mark.parametrize("build", [ConvNet, SmoothNet])
def test_channel_traces_add_up(build):
    model, loss = seeded(build), nn.CrossEntropyLoss()
    data = classification(6, *((1, 8, 8) if build is ConvNet else (4,)))
    report = hessian.layer_report(model, loss, data, channels=True, rtol=0.0, max_probes=2048, generator=seed(0))
    for name, row in report.items():
        diagonal = hessian.Hessian(model, loss, data, name).to_dense().diagonal()
        expected = diagonal.view(len(model.get_parameter(name)), -1).sum(1)
        found, errors = (torch.tensor(part, dtype=torch.float64) for part in (row.channel_traces, row.channel_stderrs))
        assert float(found.sum()) == pytest.approx(row.trace, rel=1e-9, abs=1e-12)
        if row.exact:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        else:
            assert bool(((found - expected).abs() <= 4.5 * errors + 1e-9).all())


def seed(number):
    return torch.Generator().manual_seed(number)


def test_unknown_method():
    with pytest.raises(ValueError, match="'exakt' is none of"):
        hessian.layer_report(seeded(SmoothNet), nn.CrossEntropyLoss(), classification(3, 4), method="exakt")
