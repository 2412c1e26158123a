"""python -m benchmarks.readme_figure REPORT.json: the README's figure, of a quantization report and of peers' results.

REPORT.json: of `python -m hawq.quantize digits-resnet20 --avg-bits 4 --activations 8`. The comparison is that of
benchmarks/results/quantizer_peers.md. Writes docs/images/overview.svg.
"""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.training_runs import RESULTS
from hessian.colours import BLUE, GREEN, GREY, ORANGE
from hessian.drawing import to_svg
from hessian.files import write_atomically

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "overview.svg"
STYLES = {
    "hessianware": (BLUE, "o-", "hessianware: bits by curvature"),
    "Brevitas, GPTQ": (ORANGE, "s--", "Brevitas, GPTQ"),
    "onnxruntime, static QDQ": (GREEN, "^:", "onnxruntime, static"),
}


def layers(axes: Axes, report: Mapping[str, Any]) -> None:
    """Curvature and bits of every layer."""
    rows = report["layers"]
    places = range(len(rows))
    axes.bar(places, [row["bits"] for row in rows], color=BLUE, width=0.75)
    axes.set_xticks([])
    axes.set_xlabel(f"layers of {report['task']}, first to last")
    axes.set_ylabel("bits of a weight", color=BLUE)
    curvature = axes.twinx()
    curvature.plot(places, [row["average_trace"] for row in rows], "o", color=ORANGE, markersize=4)
    curvature.set_yscale("log")
    curvature.set_ylabel("average Hessian trace", color=ORANGE)
    curvature.spines["top"].set_visible(False)
    axes.spines["top"].set_visible(False)
    axes.set_title("Curvature decides the bits", fontsize=11)


def peers(axes: Axes, text: str) -> None:
    """How far each quantizer's network is from the float one, by its bytes, at 8-bit activations."""
    pattern = r"\| ([^|]+) \| \d \| 8 \| [^|]* \| ([\d.]+)% \| ([\d.]+) \| ([\d,]+) \|"
    rows = [(name, float(kl), int(size.replace(",", ""))) for name, _, kl, size in re.findall(pattern, text)]
    for name, (colour, style, label) in STYLES.items():
        points = sorted((size / 1e3, kl) for other, kl, size in rows if other == name)
        axes.plot([size for size, _ in points], [kl for _, kl in points], style, color=colour, label=label, markersize=5)
    axes.set_yscale("log")
    axes.set_xlabel("kB of weights (digits-mobilenet, 8-bit activations)")
    axes.set_ylabel("KL from the float network")
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.3, color=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Closer to the float network in fewer bytes", fontsize=11)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="report.json of a quantized digits-resnet20")
    report = json.loads(parser.parse_args().report.read_text())
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    first, second = figure.subplots(1, 2)
    layers(first, report)
    peers(second, (RESULTS / "quantizer_peers.md").read_text())
    IMAGE.parent.mkdir(exist_ok=True)
    write_atomically(IMAGE, to_svg(figure))


if __name__ == "__main__":
    main()
