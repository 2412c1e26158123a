"""How much of the quantized network needs no floats, and how its integers compare with those of onnxruntime."""

import time
from typing import Any

from hawq.graph import example_inputs
from hawq.integer import Comparison, compare, integer_model
from hawq.job import Job
from hawq.model import QuantizedModel
from hawq.stages import bytes_digest

_SECONDS = 20  # for the comparison
_EXAMPLES = 64
_RUNS = 6  # passes of about the integer model's own time that a comparison makes


def integer_only(job: Job, model: QuantizedModel, packed: bytes, exported: bytes) -> dict[str, Any] | None:
    """What runs without floats, and how its integers compare with onnxruntime's where that takes seconds; None without any."""
    if not model.quantizers():
        return None

    def compute() -> dict[str, Any]:
        integer = integer_model(model)
        inputs = example_inputs(job.evaluation)[:_EXAMPLES]
        started = time.perf_counter()
        integer(inputs[:2])
        seconds = (time.perf_counter() - started) * _RUNS * len(inputs) / 2
        result: dict[str, Any] = {"float_operations": dict(integer.float_operations), "comparison": None, "skipped": None}
        if seconds > _SECONDS:
            return result | {"skipped": f"would take about {seconds:,.0f} s, more than {_SECONDS}"}
        compared = compare(model, inputs, exported=exported)
        return result | {"comparison": {"examples": len(inputs)} | _summary(compared)}

    result: dict[str, Any] = job.stages.run_json("integer-only", job.key | {"packed": bytes_digest(packed)}, compute)
    return result


def _summary(compared: Comparison) -> dict[str, Any]:
    places = {
        place: {
            "codes": sum(row.codes for row in rows),
            "different": sum(row.different for row in rows),
            "explained_by_ties": sum(row.explained for row in rows),
            "largest": max((row.largest for row in rows), default=0),
        }
        for place, rows in (("onnxruntime", compared.runtime), ("emulation", compared.emulation))
    }
    agreements = {"onnxruntime": compared.runtime_agreement, "emulation": compared.emulation_agreement}
    return {"codes": places, "agreement": agreements, "not_in_runtime": list(compared.not_in_runtime)}
