"""What `python -m hawq.quantize` is asked to do."""

import math
from dataclasses import dataclass
from pathlib import Path

OUTPUTS = ("model.safetensors", "model.onnx", "allocation.json", "layers.json", "report.html", "report.json")
EXTRA_OUTPUTS = ("torchao.json", "fake_quantized.safetensors")

_NO_LOSS = ("top-eigenvalue", "q-bert", "weight-error")  # sensitivities in units of their own


class UsageError(ValueError):
    """The command line asks for something that cannot be."""


@dataclass(frozen=True)
class Options:
    """What to quantize, how, and where to write it; see `hawq.command_line` for units.

    activations: the widths offered to activations, none of them for float. layer_bits: {glob: widths} in place of `bits`.
    """

    task: str
    out: Path
    weights: Path | None = None
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    activations: tuple[int, ...] = (8,)
    layer_bits: dict[str, tuple[int, ...]] | None = None
    avg_bits: float | None = None
    max_size: int | None = None
    max_bops: float | None = None
    max_latency: float | None = None
    max_drop: float | None = None
    sensitivity: str = "auto"
    rounding: str = "nearest"
    group_size: int | None = None
    symmetric: bool = False
    equalize: bool = False
    smooth: bool = False
    augment: bool = True
    reestimate_batch_norm: bool = False
    bias_correction: bool = True
    ranges: str = "mse"
    finetune: int = 0
    finetune_order: str | None = None
    data_free: bool = False
    pareto: bool = False
    calibration_size: int = 256
    batch_size: int = 128
    seed: int = 0
    drop_unreached: bool = False
    extra_formats: bool = False
    force: bool = False
    resume: bool = False
    json: bool = False
    debug: bool = False

    @property
    def activation_bits(self) -> int | None:
        """The width of activations that have none of their own, None for float."""
        return max(self.activations, default=None)

    @property
    def offered_bits(self) -> tuple[int, ...]:
        """Every width that some layer may have."""
        globs = (self.layer_bits or {}).items()
        return tuple(
            sorted({*self.bits, *(width for glob, row in globs if not glob.startswith("activation:") for width in row)})
        )

    @property
    def outputs(self) -> tuple[str, ...]:
        """The files written, report.json last."""
        return (*EXTRA_OUTPUTS, *OUTPUTS) if self.extra_formats else OUTPUTS

    def check(self) -> None:
        """Raise UsageError for values that contradict each other or their range."""
        if self.avg_bits is not None:
            self._check_average(self.avg_bits)
        for name, value, of_what in (
            ("--max-bops", self.max_bops, "bit operations"),
            ("--max-latency", self.max_latency, "seconds"),
        ):
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} {value}: give a positive fraction of the {of_what} at 8 bits")
        if self.max_drop is not None and not 0 <= self.max_drop < math.inf:
            raise UsageError(f"--max-drop {self.max_drop}: give how far the metric may fall, such as 0.01")
        if self.data_free and self.calibration_size < 2:
            raise UsageError(
                f"--calibration-size {self.calibration_size}: distilled inputs have statistics from two on: raise it"
            )
        if self.finetune_order is not None and not self.finetune:
            raise UsageError(f"--finetune-order {self.finetune_order} needs --finetune EPOCHS")
        self._check_activations()

    def _check_average(self, average: float) -> None:
        narrowest, widest = min(self.offered_bits), max(self.offered_bits)
        if not math.isfinite(average):
            raise UsageError(f"--avg-bits {average}: give a number of bits a weight")
        if average < narrowest:
            remedy = f"add {math.floor(average)} to --bits" if average >= 2 else "raise --avg-bits"
            raise UsageError(f"average of {average:g} bits asked for, but the narrowest width offered is {narrowest}: {remedy}")
        if average > widest:
            remedy = f"add {math.ceil(average)} to --bits" if average <= 8 else f"--avg-bits {widest} leaves all at it"
            raise UsageError(f"average of {average:g} bits asked for, but the widest width offered is {widest}: {remedy}")

    def _check_activations(self) -> None:
        if self.activations and 8 not in self.activations:
            raise UsageError("activations take 8 bits, or none of quantization; offer others beside it: --activations 4 8")
        if len(self.activations) > 1 and self.sensitivity in _NO_LOSS:
            raise UsageError(
                f"--sensitivity {self.sensitivity} cannot be compared with that of activations, which several --activations "
                "need: use auto, hessian-trace, second-order, gauss-newton, fisher or kl"
            )

    def check_folder(self) -> None:
        """Raise UsageError where the output folder cannot be used or would be overwritten."""
        for path in (self.out, *self.out.absolute().parents):
            if path.exists() and not path.is_dir():
                raise UsageError(f"--out {self.out}: {path} is a file, not a folder")
        if self.out.is_dir() and not self.out.stat().st_mode & 0o222:
            raise UsageError(f"--out {self.out} is read-only: name another folder or change its permissions")
        present = [name for name in (*OUTPUTS, *EXTRA_OUTPUTS) if (self.out / name).exists()]
        cut_short = self.resume and "report.json" not in present  # written last, by a run that finished
        if present and not self.force and not cut_short:
            raise UsageError(f"--out {self.out} already holds {', '.join(present)}: name another folder or add --force")
