"""python -m benchmarks.distributed: what distribution costs and brings, on two gloo ranks of this machine.

`overhead`: the trainer's step against a loop written by hand with torch alone, in the same processes in turns. `products`: a
Hessian-vector product of one batch on one rank and on two, one thread each. `plan`: the planner's seconds for every layer and
layout against the same messages timed. `chaos`: 20 kills (-9) of random ranks, the run compared with an undisturbed one.
Prints Markdown and writes it to benchmarks/results/distributed_<section>.md.
"""

import argparse
import os
import pickle
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed import HashStore
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import hessian
from hessian.files import write_atomically
from hessian.processes import Processes
from hessian.tasks.resnet import ResNet20
from parallel import curvature
from parallel.communication import Collective
from parallel.layer_cost import LAYOUTS, Grid, obstacle, traffic
from parallel.layer_shape import describe
from parallel.measure import measure
from parallel.train_options import Config
from parallel.trainer import Trainer

RESULTS = Path(__file__).parent / "results"
STEPS = 30


def _worker(rank: int, ranks: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    result = function(*arguments)
    Path(folder, f"result{rank}").write_bytes(pickle.dumps(result))
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)


def on_ranks(function: Callable[..., Any], ranks: int, *arguments: Any) -> Any:
    """What `function` returns on rank 0 of so many processes of one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_worker, (ranks, folder, function, arguments), nprocs=ranks)
        return pickle.loads(Path(folder, "result0").read_bytes())


def _seconds(function: Callable[[], object]) -> float:
    distributed.barrier()
    start = time.perf_counter()
    function()
    distributed.barrier()  # the slower rank counts
    return time.perf_counter() - start


def by_hand(task: hessian.Task, batch_size: int) -> Iterator[float]:
    """The loop that everybody writes: a sampler, DistributedDataParallel, SGD."""
    ranks = distributed.get_world_size()
    sampler: Any = DistributedSampler(task.train) if ranks > 1 else None
    loader = DataLoader(task.train, batch_size // ranks, shuffle=sampler is None, sampler=sampler, drop_last=True)
    model = DistributedDataParallel(task.model.train()) if ranks > 1 else task.model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    while True:
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = task.loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            yield loss.item()


def images(size: int) -> hessian.Task:
    """ResNet-20 and random images."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(512, 3, size, size, generator=generator), torch.randint(0, 10, (512,), generator=generator)
    )
    torch.manual_seed(1)
    return hessian.Task(
        ResNet20(3, 10), data, data, nn.CrossEntropyLoss(), lambda o, t: (o.argmax(1) == t).float().mean(), "images"
    )


def steps(size: int, batch_size: int) -> dict[str, list[float]]:
    """Seconds of steps of both, in turns, whose order changes."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    processes = Processes(rank, ranks, torch.device("cpu"), HashStore(), 0)
    config = Config("images", steps=10 * STEPS, batch_size=batch_size, batch_norm="local")
    loops = {"trainer": Trainer(images(size), config, processes).train(), "by hand": by_hand(images(size), batch_size)}
    found: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(STEPS + 3):
        for name in sorted(loops, reverse=bool(number % 2)):
            found[name].append(_seconds(lambda name=name: next(loops[name])))  # type: ignore[misc]
    return {name: times[3:] for name, times in found.items()}


def overhead() -> str:
    """Table of medians and of the median ratio of neighbouring steps."""
    lines = [
        "| images | ranks | trainer, ms a step | by hand, ms a step | ratio |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for size in (16, 32):
        for ranks in (1, 2):
            found = on_ranks(steps, ranks, size, 128)
            ours, plain = (statistics.median(found[name]) for name in ("trainer", "by hand"))
            ratio = statistics.median(one / other for one, other in zip(found["trainer"], found["by hand"], strict=True))
            lines.append(f"| {size}x{size} | {ranks} | {1e3 * ours:.1f} | {1e3 * plain:.1f} | {ratio:.3f} |")
    return "## The trainer's step\n\nResNet-20, batch 128 over all ranks, batch norm of each rank's part.\n\n" + "\n".join(
        lines
    )


def product_seconds(examples: int, size: int) -> float:
    """The median time of a product with the Hessian of one batch that the ranks share."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    model = ResNet20(3, 10).eval()
    x, targets = torch.randn(examples, 3, size, size), torch.randint(0, 10, (examples,))
    own = slice(examples * rank // ranks, examples * (rank + 1) // ranks)
    operator = curvature.hessian(model, nn.CrossEntropyLoss(), (x[own], targets[own]))
    vector = torch.randn(operator.shape[0])
    operator @ vector
    return statistics.median(_seconds(lambda: operator @ vector) for _ in range(9))


def products() -> str:
    """Table of the times on one rank and on two."""
    lines = ["| batch | one rank, ms | two ranks, ms | ratio |", "| --- | ---: | ---: | ---: |"]
    for examples, size in ((64, 32), (128, 32), (256, 16)):
        one, two = (on_ranks(product_seconds, ranks, examples, size) for ranks in (1, 2))
        lines.append(f"| {examples} at {size}x{size} | {1e3 * one:.1f} | {1e3 * two:.1f} | {two / one:.2f} |")
    return "## A Hessian-vector product\n\nResNet-20, graph kept, one thread a rank.\n\n" + "\n".join(lines)


def _message(collective: Collective) -> Callable[[], object]:
    """The collective on this group, as the layouts do it."""
    values = max(1, int(collective.num_bytes) // 4)
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    if collective.kind == "all-reduce":
        tensor = torch.zeros(values)
        return lambda: distributed.all_reduce(tensor)
    part = values if collective.kind == "halo" else -(-values // ranks)
    sent, received = torch.zeros(part), torch.zeros(part)
    other = (rank + 1) % ranks
    return lambda: [
        work.wait()
        for work in distributed.batch_isend_irecv(
            [distributed.P2POp(distributed.isend, sent, other), distributed.P2POp(distributed.irecv, received, other)]
        )
    ]


def predictions() -> list[tuple[str, str, float, float]]:
    """(layer, layout, predicted, measured) seconds of every layer's messages on two ranks."""
    network = measure()
    layers = describe(ResNet20(3, 10), torch.zeros(1, 3, 32, 32))
    rows = []
    for layer in layers:
        for layout in LAYOUTS:
            grid = Grid(1, 2) if layout == "batch" else Grid(2, 1)
            if obstacle(layer, layout, grid, 64):
                continue
            sent = traffic(layer, layout, grid, 64, first=layer is layers[0])
            messages = [_message(one) for one in sent]
            took = sum(statistics.median(_seconds(message) for _ in range(7)) for message in messages)
            rows.append((layer.name, layout, sum(network.seconds(one) for one in sent), took))
    return rows


def plan() -> str:
    """Table of sums by layout and of the errors by layer."""
    rows = on_ranks(predictions, 2)
    lines = [
        "| layout | layers | predicted, ms | measured, ms | median error of a layer |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for layout in LAYOUTS:
        own = [(predicted, took) for _, name, predicted, took in rows if name == layout and took > 0]
        errors = statistics.median(abs(predicted - took) / took for predicted, took in own)
        sums = [1e3 * sum(column) for column in zip(*own, strict=True)]
        lines.append(f"| {layout} | {len(own)} | {sums[0]:.2f} | {sums[1]:.2f} | {errors:.0%} |")
    return "## The planner's seconds\n\nResNet-20 at 32x32, batch 64, every layer alone; alpha and beta measured first.\n\n" + (
        "\n".join(lines)
    )


def small() -> hessian.Task:
    """A task whose steps take milliseconds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 2, 8, 8, generator=generator)
    y = (x.mean((1, 2, 3)) * 20).long().clamp(-1, 1) + 1
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(256, 3)
    )
    train, test = TensorDataset(x[:72], y[:72]), TensorDataset(x[72:], y[72:])
    return hessian.Task(model, train, test, nn.CrossEntropyLoss(), lambda o, t: (o.argmax(1) == t).float().mean(), "small")


def chaos(kills: int = 20, total: int = 400) -> str:
    """Kill ranks at random steps until all kills are spent; compare with a run that nobody disturbed."""
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:

        def command(out: str) -> list[str]:
            torchrun = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node=2",
                "--max-restarts=99",
            ]
            task = ["-m", "parallel.train", "benchmarks.distributed:small", "--out", out, "--steps", str(total)]
            options = ["--batch-size", "12", "--checkpoint-every", "20", "--evaluate-every", "1000000"]
            return [*torchrun, "--monitor-interval=0.1", *task, *options]

        quiet, disturbed = f"{folder}/quiet", f"{folder}/disturbed"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        silent = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(command(quiet), check=True, **silent)
        run = subprocess.Popen(command(disturbed), **silent)
        metrics, done = Path(disturbed, "metrics.jsonl"), 0
        for step in sorted(random.sample(range(3, total - 5), kills)):
            while run.poll() is None and (not metrics.exists() or len(metrics.read_bytes().splitlines()) < step):
                time.sleep(0.002)
            found = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=False).stdout.split()
            if len(found) == 2:
                os.kill(int(random.choice(found)), signal.SIGKILL)
                done += 1
            time.sleep(1.5)
        run.wait()
        one, other = (safetensors.torch.load_file(f"{path}/model.safetensors") for path in (quiet, disturbed))
        weights = all(torch.equal(tensor, other[name]) for name, tensor in one.items())
        losses = Path(quiet, "metrics.jsonl").read_text() == metrics.read_text()
    equal = f"final weights equal bit for bit: {weights}; all {total} lines of metrics.jsonl equal: {losses}"
    return f"## Chaos\n\n{done} kills (-9) of a random rank at random steps of {total}: {equal}."


SECTIONS: dict[str, Callable[[], str]] = {"overhead": overhead, "products": products, "plan": plan, "chaos": chaos}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    chosen = parser.parse_args().only
    for name, section in SECTIONS.items():
        if chosen in (None, name):
            machine = (
                f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores"
            )
            text = f"{section()}\n\n`python -m benchmarks.distributed --only {name}`, {machine}\n"
            print(text, flush=True)
            write_atomically(RESULTS / f"distributed_{name}.md", text)


if __name__ == "__main__":
    main()
