"""Planned memory, component by component, against torch's allocator on phantom GPUs."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.testing.phantom_gpu import environment, run_python

from .family_cases import family_cases
from .layout_cases import FEW, LayoutCase, benchmark_cases, example_cases, random_cases

SHARE, AMOUNT_BYTES = 0.05, 200e6
"""A component may differ by the larger of both."""

GPU_BYTES = 1 << 40
"""Nothing is written to it, so that it takes no memory."""

COPY_BYTES = 1 << 20
"""Of each copy that the phantom carries out; the rest is not needed without arithmetic."""

COMPONENTS = {
    "weight_bytes": "weights",
    "adapter_bytes": "adapters",
    "head_copy_bytes": "head_copies",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer",
    "step_bytes": "step",
}
"""Measured -> planned."""


def measured(cases: list[LayoutCase], directory: Path) -> list[dict[str, Any]]:
    file = directory / "cases.jsonl"
    file.write_text("\n".join(case.as_json() for case in cases))
    script = str(Path(__file__).with_name("measured_layouts.py"))
    variables = environment(arithmetic="none", bytes_per_gpu=GPU_BYTES)
    variables["PHANTOM_GPU_COPY_BYTES"] = str(COPY_BYTES)
    ran = run_python(["-W", "ignore", script, str(file)], variables)
    marked = [line for line in ran.stdout.splitlines() if line.startswith("MEASURED ")]
    assert ran.code == 0, f"{cases[len(marked)]}\n{ran.stderr[-3000:]}"
    return [json.loads(line.removeprefix("MEASURED ")) for line in marked]


def differences(cases: list[LayoutCase], directory: Path) -> list[str]:
    """Components that are planned wrongly."""
    wrong = []
    for case, found in zip(cases, measured(cases, directory), strict=True):
        planned = case.planned()
        for theirs, ours in COMPONENTS.items():
            is_bytes, should_be = getattr(planned, ours), found[theirs]
            if abs(is_bytes - should_be) > max(SHARE * should_be, AMOUNT_BYTES):
                amounts = f"{is_bytes / 1e9:.3f} GB planned, {should_be / 1e9:.3f} measured"
                wrong.append(f"{case.name}: {ours} {amounts}")
    return wrong


def test_components_of_a_few_layouts(has_phantom_gpu: None, tmp_path: Path) -> None:
    assert differences(FEW, tmp_path) == []


MORE = [*example_cases(), *benchmark_cases(), *random_cases(2129, 20), *family_cases()]


# 30 s and more each: whole models.
@pytest.mark.exhaustive
@pytest.mark.parametrize("cases", [MORE[i : i + 5] for i in range(0, len(MORE), 5)])
def test_components_of_more_layouts(
    has_phantom_gpu: None, tmp_path: Path, cases: list[LayoutCase]
) -> None:
    assert differences(cases, tmp_path) == []
