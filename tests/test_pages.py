"""The three reports in headless Chromium: no errors, nothing wider than the screen, figures whole, tables that sort."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

import hawq.quantize
import hessian.__main__
from hessian.processes import joined
from parallel.train import train
from parallel.train_options import Config

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
PROBE = """
<script>
const errors = [];
window.addEventListener("error", event => errors.push(event.message));
window.addEventListener("load", () => {
  const outside = [], figures = [...document.querySelectorAll("figure svg")];
  for (const svg of figures) {
    const frame = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll("text")) {
      const box = text.getBoundingClientRect();
      const slack = 5;  // white space around a power of ten
      if (box.left < frame.left - slack || box.right > frame.right + slack || box.top < frame.top - slack ||
          box.bottom > frame.bottom + slack) outside.push(text.textContent);
    }
  }
  const columns = [...document.querySelectorAll("table.sortable")].map(table => {
    const number = (row, column) => Number(row.cells[column].dataset.value ?? row.cells[column].textContent);
    const rows = () => [...table.tBodies[0].rows];
    const heads = [...table.tHead.rows[0].cells];
    const column = heads.findIndex((_, index) => index > 0 && rows().every(row => Number.isFinite(number(row, index))));
    const numbers = () => rows().map(row => number(row, column));
    const head = heads[column];
    head.click();
    const up = numbers();
    head.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter"}));
    return {up, down: numbers(), sort: head.getAttribute("aria-sort")};
  });
  const small = figures.filter(one => one.clientWidth < 200).length, width = document.documentElement.scrollWidth;
  const measured = {errors, outside, columns, figures: figures.length, small, width, screen: window.innerWidth,
    ink: getComputedStyle(document.body).color};
  parent.postMessage(JSON.stringify(measured), "*");
});
</script>
"""
FRAME = """<body style="margin:0"><iframe src="page.html" width="{width}" height="3000" style="border:0"></iframe><pre></pre>
<script>window.addEventListener("message", event => document.querySelector("pre").textContent = event.data)</script>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    task = "tests.training_tasks:small"
    few = ["--examples", "16", "--eigenvalues", "2", "--probes", "2", "--steps", "4", "--layers"]
    assert hessian.__main__.main([task, *few, "--out", str(folder / "hessian")]) == 0
    quick = ["--calibration-size", "16", "--avg-bits", "4", "--activations", "8"]
    assert hawq.quantize.main([f"{task}_in_float32", *quick, "--out", str(folder / "hawq")]) == 0
    with joined() as processes:
        options = {"steps": 6, "batch_size": 7, "adaptive_batch": "growing", "sharpness_every": 2, "attack": "fgsm"}
        train(Config(task, folder / "parallel", **options), processes)
    return {name: (folder / name / "report.html").read_text() for name in ("hessian", "hawq", "parallel")}


def in_chromium(page: str, width: int, folder: Path, *, dark: bool = False) -> dict[str, object]:
    """What the probe found; a frame stands for a telephone, because windows have a least width."""
    (folder / "page.html").write_text(page.replace("<style>", f"{PROBE}<style>", 1))
    (folder / "frame.html").write_text(FRAME.format(width=width))
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=5000"]
    command += [
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--enable-logging=stderr",
        "--window-size=1400,3000",
    ]
    done = subprocess.run([*command, (folder / "frame.html").as_uri()], capture_output=True, text=True, check=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r"<pre>(.+?)</pre>", done.stdout, re.DOTALL)
    assert found is not None, done.stdout[:500]
    return json.loads(unescape(found.group(1)))


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: pages cannot be looked at")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(("name", "figures"), [("hessian", 5), ("hawq", 5), ("parallel", 1)])
def test_pages_can_be_read(pages, name, figures, width, tmp_path):
    found = in_chromium(pages[name], width, tmp_path, dark=width == 390)
    assert found["errors"] == []
    assert found["figures"] == figures
    assert found["small"] == 0
    assert found["outside"] == []
    assert found["width"] <= width
    assert found["screen"] == width
    assert found["ink"] == ("rgb(228, 231, 235)" if width == 390 else "rgb(27, 31, 36)")
    for column in found["columns"]:
        assert column["up"] == sorted(column["up"])
        assert column["down"] == sorted(column["down"], reverse=True)
        assert column["sort"] == "descending"
    assert len(found["columns"]) == (name != "parallel")


@pytest.mark.parametrize("name", ["hessian", "hawq", "parallel"])
def test_pages_load_nothing(pages, name):
    sources = re.findall(r"""(?:src|href)=["']([^"']+)""", pages[name])
    assert all(source.startswith(("#", "data:", "http://www.w3.org")) for source in sources)
    assert not re.search(r"@import|url\((?!#)", pages[name])
