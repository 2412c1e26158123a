"""python -m benchmarks.engine: what curvature costs here and in other libraries, in the same process on the same work.

Times are medians; ratios are to the time of one gradient. Peers that are not installed are left out: curvlinops-for-pytorch,
hessian-eigenthings and pyhessian, with `pip install --no-deps`. Prints Markdown and writes it to
benchmarks/results/engine_<device>.md.
"""

import argparse
import copy
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from scipy.stats import wasserstein_distance
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hessian
from benchmarks import peers
from hessian.files import write_atomically
from hessian.tasks.resnet import ResNet20
from hessian.tasks.transformer import Transformer

Batch = tuple[torch.Tensor, torch.Tensor]
RESULTS = Path(__file__).parent / "results"
DEPTHWISE_CHANNELS = 64
DENSITY_SEEDS = 10
_TRACEABLE = 70  # tensors of a model above which torch.func.linearize takes minutes


def seconds(function: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """The median time of a call, after one that does not count."""
    times = []
    for repeat in range(repeats + 1):
        _finish(device)
        start = time.perf_counter()
        function()
        _finish(device)
        if repeat:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gradient(model: nn.Module, loss: nn.Module, batch: Batch) -> Callable[[], object]:
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(loss(model(batch[0]), batch[1]), parameters)


def _linearized(model: nn.Module, loss: nn.Module, batch: Batch, vector: torch.Tensor) -> tuple[Callable[[], object], float]:
    """Forward-over-reverse products from one linearisation, and the seconds that this took."""
    from torch.func import functional_call, grad, linearize

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    start = time.perf_counter()
    with sdpa_kernel(SDPBackend.MATH):
        _, push = linearize(grad(lambda values: loss(functional_call(model, values, (batch[0],)), batch[1])), parameters)
    took = time.perf_counter() - start
    pieces = vector.split([parameter.numel() for parameter in parameters.values()])
    tangents = {name: piece.view(parameters[name].shape) for name, piece in zip(parameters, pieces, strict=True)}
    return lambda: push(tangents), took


def products(device: torch.device) -> list[str]:
    """One product against one gradient, on several networks."""
    generator = torch.Generator().manual_seed(0)
    depthwise = nn.Sequential(
        *(
            layer
            for _ in range(2)
            for layer in (nn.Conv2d(DEPTHWISE_CHANNELS, DEPTHWISE_CHANNELS, 3, padding=1, groups=DEPTHWISE_CHANNELS), nn.ReLU())
        ),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    tokens = torch.randint(0, 71, (32, 65), generator=generator)
    cases = {
        "ResNet-20, 32x32, batch 128": (ResNet20(3, 10), torch.randn(128, 3, 32, 32, generator=generator), 10),
        "two depthwise 3x3, batch 64": (depthwise, torch.randn(64, DEPTHWISE_CHANNELS, 32, 32, generator=generator), 10),
        "MobileNet on digits, batch 128": (hessian.load_task("digits-mobilenet").model, torch.randn(128, 1, 16, 16), 10),
        "character transformer, batch 32": (Transformer(71, 64), tokens[:, :-1], 0),
    }
    columns = [
        "network",
        "product",
        "set-up, in products",
        "a vector of 8 over 4 batches",
        "linearize",
        "its set-up",
        "curvlinops",
    ]
    lines = [f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * 6]
    for name, (model, inputs, classes) in cases.items():
        targets = torch.randint(0, classes, (len(inputs),), generator=generator) if classes else tokens[:, 1:]
        batch = (inputs.to(device), targets.to(device))
        lines.append(_product_row(name, model.eval().to(device), batch, device))
    return lines


def _product_row(name: str, model: nn.Module, batch: Batch, device: torch.device) -> str:
    loss = nn.CrossEntropyLoss()
    one = seconds(_gradient(model, loss, batch), device)
    operator = hessian.Hessian(model, loss, batch)
    vector = torch.randn(operator.shape[0], device=device)
    start = time.perf_counter()
    operator @ vector
    _finish(device)
    first = time.perf_counter() - start
    product = seconds(lambda: operator @ vector, device)
    quarters = list(zip(*(part.split(-(-len(part) // 4)) for part in batch), strict=True))
    block = torch.randn(8, operator.shape[0], device=device)
    several = hessian.Hessian(model, loss, quarters)
    of_block = seconds(lambda: several.rows(block), device, 3) / 8
    cells = [f"{product / one:.2f}", f"{(first - product) / product:.1f}", f"{of_block / one:.2f}", "-", "-", "-"]
    if len(list(model.parameters())) < _TRACEABLE:
        push, setup = _linearized(model, loss, batch, vector)
        linearized = seconds(push, device, 3)
        cells[3:5] = [f"{linearized / one:.2f}", f"{setup / linearized:.0f}"]
    if peers.installed("curvlinops"):
        peer = peers.curvlinops_product(model, loss, [batch])
        try:
            cells[-1] = f"{seconds(lambda: peer @ vector, device, 3) / one:.2f}"
        except RuntimeError:
            cells[-1] = "fails"
    return f"| {name} ({1000 * one:.0f} ms a gradient) | {' | '.join(cells)} |"


def eigenvalues(device: torch.device) -> list[str]:
    """Top 5 of the trained ResNet-20 on 256 examples, against peers."""
    task, batch = _digits(device)
    model, loss = task.model, task.loss
    exact = hessian.Hessian(model, loss, batch)
    truth = hessian.top_eigenpairs(exact, 8, tol=1e-5, generator=torch.Generator().manual_seed(1)).values[:5]
    ours: dict[str, Callable[[], peers.Found]] = {}
    count = 0

    def run() -> peers.Found:
        nonlocal count
        operator = hessian.Hessian(model, loss, batch)  # set-up counts
        pairs = hessian.top_eigenpairs(operator, 5, generator=torch.Generator().manual_seed(0))
        count = pairs.num_matvecs
        return peers.Found(pairs.values.numpy(), pairs.vectors.cpu())

    ours["hessianware"] = run
    if device.type == "cpu":
        if peers.installed("curvlinops"):
            ours["curvlinops + eigsh"] = lambda: peers.curvlinops_eigenpairs(model, loss, batch, 5)
        if peers.installed("hessian_eigenthings"):
            ours["hessian-eigenthings"] = lambda: peers.eigenthings_eigenpairs(copy.deepcopy(model), loss, batch, 5)
        if peers.installed("pyhessian"):
            ours["PyHessian"] = lambda: peers.pyhessian_eigenpairs(copy.deepcopy(model), loss, batch, 5)
    lines = [
        f"Truth {', '.join(f'{value:.4f}' for value in truth.tolist())}; hessianware took {{count}} products.",
        "",
        "| library | seconds | ratio | values | largest error / lambda_1 | largest residual / lambda_1 |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    base = 0.0
    for name, call in ours.items():
        found = call()
        took = seconds(call, device, 2)
        base = base or took
        vectors = found.vectors.to(device, torch.float32)
        vectors = vectors / vectors.norm(dim=0)
        values = torch.tensor(found.values.copy(), device=device, dtype=torch.float32)
        residual = float((exact @ vectors - vectors * values).norm(dim=0).max() / truth[0])
        error = float((torch.tensor(found.values.copy()) - truth).abs().max() / truth[0])
        shown = " ".join(f"{value:.4f}" for value in found.values)
        lines.append(f"| {name} | {took:.2f} | {took / base:.2f} | {shown} | {error:.1e} | {residual:.1e} |")
    lines[0] = lines[0].replace("{count}", str(count))
    return lines


def layer_traces(device: torch.device) -> list[str]:
    """All layer traces exactly, against what Hutchinson's estimator takes for the error that it leaves."""
    task, batch = _digits(device)
    one = seconds(_gradient(task.model, task.loss, batch), device)
    report = hessian.layer_report(task.model, task.loss, batch)
    took = seconds(lambda: hessian.layer_report(task.model, task.loss, batch), device, 3)
    weights = [name for name, row in report.items() if row.num_params > 100]
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    sampled = hessian.layer_report(
        task.model, task.loss, batch, weights, method="hutchinson", rtol=0.0, max_probes=64, generator=generator
    )
    hutchinson = time.perf_counter() - start
    errors = [abs(sampled[name].trace - report[name].trace) / report[name].trace for name in weights]
    typical = statistics.median(errors)
    needed = hutchinson * (typical / 0.01) ** 2
    return [
        f"- all {len(report)} tensors exactly: {took:.2f} s = {took / one:.1f} gradients",
        f"- Hutchinson, 64 products for all weights: {hutchinson:.1f} s, median error {typical:.1%}; a median error of 1% "
        f"would take {needed:.0f} s, {needed / took:.0f} times as long",
    ]


def density(_: torch.device) -> list[str]:
    """Wasserstein-1 distance to the dense spectrum of a 2,000-parameter network, 10 probes of 80 steps each."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 44), nn.Tanh(), nn.Linear(44, 20), nn.Tanh(), nn.Linear(20, 8))
    inputs = torch.randn(200, 20, generator=generator)
    batch = (inputs, (inputs @ torch.randn(20, 8, generator=generator)).argmax(1))
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _step in range(100):
        optimizer.zero_grad()
        loss(model(batch[0]), batch[1]).backward()
        optimizer.step()
    optimizer.zero_grad()
    double = hessian.Hessian(copy.deepcopy(model).double(), loss, (batch[0].double(), batch[1]))
    dense = torch.linalg.eigvalsh(double.to_dense())
    extent = float(dense.max() - dense.min())
    operator = hessian.Hessian(model, loss, batch)
    distances: dict[str, list[float]] = {}
    for seed in range(DENSITY_SEEDS):
        found = hessian.spectral_density(operator, 10, 80, generator=torch.Generator().manual_seed(seed))
        measures = {"hessianware": (found.nodes.numpy().ravel(), found.weights.numpy().ravel())}
        if peers.installed("hessian_eigenthings"):
            measures["hessian-eigenthings"] = peers.eigenthings_density(copy.deepcopy(model), loss, batch, 10, 80, seed)
        for name, (nodes, weights) in measures.items():
            distance = wasserstein_distance(nodes, dense.numpy(), weights) / extent
            distances.setdefault(name, []).append(distance)
    title = f"P = {len(dense):,}; 10 probes x 80 steps; {DENSITY_SEEDS} seeds."
    lines = [title, "", "| library | W1 / range, mean | largest |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {statistics.mean(values):.3%} | {max(values):.3%} |" for name, values in distances.items()]
    if peers.installed("pyhessian"):
        lines.append("| PyHessian 0.1 | fails: it calls torch.eig, which torch has removed | |")
    return lines


def memory(device: torch.device) -> list[str]:
    """Resident memory over 1,000 products."""
    task, batch = _digits(device, 32)
    operator = hessian.Hessian(task.model, task.loss, batch)
    vector = torch.randn(operator.shape[0], device=device)
    sizes = []
    for number in range(1000):
        operator @ vector
        if number in (99, 999):
            sizes.append(torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident())
    early, late = sizes
    return [f"- after 100 products {early / 2**20:.0f} MiB, after 1,000 {late / 2**20:.0f} MiB ({late / early - 1:+.1%})"]


def transformer(device: torch.device, millions: int) -> list[str]:
    """Top eigenvalue (and on a GPU the layer report) of a transformer of about that many million parameters."""
    width = 640 if millions <= 100 else 2048
    layers = max(1, round(millions * 1e6 / (12 * width**2)))
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        model = Transformer(512, 64, width=width, num_layers=layers, num_heads=width // 64)
    size = sum(parameter.numel() for parameter in model.parameters())
    tokens = torch.randint(0, 512, (4, 65), generator=torch.Generator().manual_seed(0)).to(device)
    operator = hessian.Hessian(model, nn.CrossEntropyLoss(), (tokens[:, :-1], tokens[:, 1:]))
    start = time.perf_counter()
    pairs = hessian.top_eigenpairs(operator, 1, tol=1e-2, generator=torch.Generator(device).manual_seed(0))
    took = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak()
    line = f"- {size / 1e6:.0f}M parameters: lambda_1 = {float(pairs.values[0]):.4g} +- {float(pairs.residuals[0]):.1g}"
    lines = [f"{line}, {pairs.num_matvecs} products, {took:.0f} s, peak memory {peak / 2**30:.1f} GiB"]
    if device.type == "cuda":
        start = time.perf_counter()
        report = hessian.layer_report(
            model, operator.objective.loss, operator.objective.data, max_probes=32, generator=torch.Generator().manual_seed(0)
        )
        lines.append(
            f"- its layer report: {len(report)} tensors, {time.perf_counter() - start:.0f} s, {report.num_matvecs} products"
        )
    return lines


def _digits(device: torch.device, examples: int = 256) -> tuple[hessian.Task, Batch]:
    task = hessian.load_task("digits-resnet20")
    task.model.to(device)
    images, targets = task.train.tensors
    return task, (images[:examples].to(device), targets[:examples].to(device))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


SECTIONS: dict[str, tuple[str, Callable[[torch.device], list[str]]]] = {
    "transformer": ("A transformer's top eigenvalue", lambda device: transformer(device, 66)),
    "billion": ("A transformer of a billion parameters", lambda device: transformer(device, 1000)),
    "products": ("One product, in gradients", products),
    "eigenvalues": ("Top 5 eigenvalues of the trained ResNet-20, 256 examples", eigenvalues),
    "layers": ("Layer traces of the same network", layer_traces),
    "density": ("Spectral density", density),
    "memory": ("Memory over 1,000 products", memory),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="some sections; nothing is written then")
    options = parser.parse_args()
    chosen = options.only or [name for name in SECTIONS if name != "billion" or options.device.type == "cuda"]
    name = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else f"{os.cpu_count()} cores"
    versions = f"Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}, {platform.machine()}, {name}"
    lines = [f"`python -m benchmarks.engine --device {options.device.type}`, {versions}", ""]
    for section in chosen:
        title, run = SECTIONS[section]
        lines += [f"## {title}", "", *run(options.device), ""]
        print("\n".join(lines[-len(lines) :]) if section == chosen[-1] else f"{title}: done", flush=True)
    if options.only is None:
        write_atomically(RESULTS / f"engine_{options.device.type}.md", "\n".join(lines))


if __name__ == "__main__":
    main()
