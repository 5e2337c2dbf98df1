"""The verb `plan`: output, refusals, search, advice."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.cli.main import main
from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS
from megatron_idpo.plan.choices import balanced_split, cheapest_recompute, fits
from megatron_idpo.plan.devices import DEVICES
from megatron_idpo.plan.memory import run_memory
from megatron_idpo.plan.models import find_model
from megatron_idpo.plan.nearest import nearest_that_fits
from megatron_idpo.plan.plan import Plan
from megatron_idpo.plan.run_sizes import Assumptions, RunSizes
from megatron_idpo.plan.search import search

EXAMPLES = Path(__file__).parents[2] / "examples"
H100 = DEVICES["h100"]


def run_of(example: str, gpus: int, *overrides: str) -> RunSizes:
    config = load_config(EXAMPLES / f"{example}.yaml", overrides, optional=SECTIONS)
    return RunSizes.of(config, find_model(config.model.path).sizes, gpus, Assumptions())


def planned(capsys: Any, *words: str) -> Any:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_stages_time_and_verdict(capsys):
    path = str(EXAMPLES / "llama3_70b_full.yaml")
    plan = planned(capsys, path, "--gpus", "64", "--device", "h200")
    assert plan["fits"] and plan["step_s"] > 0 and plan["layout"]["data"] == 2
    assert [stage["taps"] for stage in plan["stages"]] == [[], [], [55], []]
    for stage in plan["stages"]:
        assert 20e9 < stage["peak_bytes"] < plan["device_bytes"]
        assert stage["components_bytes"]["weights"] > 4e9


def test_text_names_components_margins_and_what_is_assumed(capsys):
    assert main(["plan", str(EXAMPLES / "llama3_70b.yaml"), "--gpus", "64"]) == 0
    text = capsys.readouterr().out
    for part in ("70.6 B parameters", "table of known models", "fragmentation, 5%", "NCCL", "Fits"):
        assert part in text
    assert "roofline estimate, not measured" in text and "800 positions per pair" in text


def test_a_plan_imports_no_torch_and_takes_two_seconds():
    program = "import sys; from megatron_idpo.cli.main import main; code = main(sys.argv[1:]); "
    program += "assert not {'torch', 'transformers', 'megatron'} & set(sys.modules); sys.exit(code)"
    words = [sys.executable, "-c", program, "plan", str(EXAMPLES / "llama3_70b.yaml"), "--gpus"]
    subprocess.run([*words, "64"], check=True, capture_output=True)


def test_what_does_not_fit_is_refused_with_the_fastest_layout_that_does(capsys):
    path = str(EXAMPLES / "llama3_8b_full.yaml")
    overrides = ["layout.tensor=1", "layout.sequence_parallel=false", "data.row_tokens=8192"]
    assert main(["plan", path, *overrides, "--gpus", "8"]) == 2
    error = capsys.readouterr().err
    assert "a GPU needs" in error
    assert "the same layout: training.recompute=full" in error  # the smaller change comes first
    assert "the fastest layout: layout='{tensor: " in error


def test_a_model_that_fits_in_no_layout_is_refused_with_the_nearest_that_do(capsys):
    path = str(EXAMPLES / "llama3_70b_full.yaml")
    assert main(["plan", path, "--gpus", "8", "--search"]) == 2
    error = capsys.readouterr().err
    assert "no layout fits 8 × H100" in error
    assert "GPUs: layout=" in error and "LoRA on these GPUs" in error
    assert "not supported: the optimizer's state on the host (53 GB per GPU" in error


def test_what_is_named_as_the_nearest_fits():
    small = run_of("llama3_70b_full", 8, "layout={tensor: 8, sequence_parallel: true}")
    assert not search(small, H100)
    first = nearest_that_fits(small, H100)[0]
    gpus, settings = first.split(" GPUs: ")
    again = run_of("llama3_70b_full", int(gpus), *shlex.split(settings))
    assert int(gpus) > 8 and again.layout != small.layout
    assert Plan.of(again, H100).fits
    assert not search(replace(small, world_size=int(gpus) - 8), H100)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "--gpus: is 0"),
        (["--device", "h10", "--gpus", "8"], "did you mean h100"),
        (["--gpus", "12"], "do not divide the world of 12"),
        (["--gpus", "12"], "this layout: --gpus 8 or 16"),
        (["--gpus", "8", "--headroom", "2"], "--headroom: is 2.0"),
        (["model.path=org/unknown", "--gpus", "64"], "hf download org/unknown config.json"),
    ],
)
def test_errors_name_a_remedy(capsys, words, message):
    assert main(["plan", str(EXAMPLES / "llama3_70b.yaml"), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("example", "gpus", "overrides"),
    [
        ("llama3_8b", 1, ["layout=null"]),
        ("llama3_8b_full", 8, ["layout=null"]),
        ("llama3_70b_full", 64, ["layout=null"]),
        ("llama3_8b", 16, ["layout=null", "model.path=mistralai/Mixtral-8x7B-Instruct-v0.1"]),
    ],
)
def test_everything_that_a_search_finds_fits_and_is_sorted(example, gpus, overrides):
    found = search(run_of(example, gpus, *overrides), H100)
    assert found and all(one.plan.fits for one in found)
    steps = [one.plan.time.step for one in found]
    assert steps == sorted(steps)
    # Its settings, as overrides of the file, give the same plan.
    for one in (found[0], found[-1]):
        words = [word for line in one.settings for word in shlex.split(line)]
        again = Plan.of(run_of(example, gpus, *overrides, *words), H100)
        assert again.largest.total == one.plan.largest.total
        assert again.time.step == one.plan.time.step


def test_a_search_names_changes_of_the_file_and_marks_its_layout():
    run = run_of("llama3_8b_128k", 8)
    found = search(run, H100)
    (own,) = [one for one in found if one.is_in_file]
    assert own.plan.run.layout == run.layout and own.plan.run.layout.context == 8
    assert not any("layout" in line for line in own.settings)
    # The file recomputes; a layout that needs none says so.
    off = [one for one in found if one.plan.run.recompute == "off"]
    assert all("training.recompute=off" in one.settings[-1] for one in off)
    contexts = {one.plan.run.layout.context for one in found}
    assert {1, 8} <= contexts


def test_more_replicas_than_pairs_are_reported(capsys):
    path = str(EXAMPLES / "llama3_70b.yaml")
    plan = planned(capsys, path, "--gpus", "1024")
    assert "64 of 128 replicas of the model have no pair" in plan["warnings"][0]
    uneven = planned(capsys, path, "--gpus", "24")["warnings"]
    assert "not a multiple of the 3 replicas" in uneven[0]


def test_fewer_pairs_than_a_batch_are_reported(capsys):
    path = str(EXAMPLES / "llama3_8b.yaml")
    words = (path, "--gpus", "8", "training.global_batch_pairs=32", "--pairs")
    assert not planned(capsys, *words, "32")["warnings"]
    (warning,) = planned(capsys, *words, "24")["warnings"]
    assert "=32: the run has only 24 pairs" in warning


def test_a_plan_for_a_cpu_names_nothing_of_a_gpu(capsys):
    path = str(EXAMPLES / "quickstart.yaml")
    assert main(["plan", path, "model.path=HuggingFaceTB/SmolLM2-135M", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "GB in one process" in text and not {"CUDA", "GPU", "NCCL"} & set(text.split())


def test_overrides_may_follow_options(capsys):
    path = str(EXAMPLES / "llama3_8b.yaml")
    plan = planned(capsys, path, "--gpus", "8", "layout={tensor: 4, sequence_parallel: true}")
    assert plan["layout"]["tensor"] == 4


def test_long_pairs_are_assumed_to_be_as_long_as_allowed(capsys):
    path = str(EXAMPLES / "llama3_8b_128k.yaml")
    plan = planned(capsys, path, "--gpus", "8")
    assert plan["assumed"]["pair_tokens"] == 131072 and plan["days"] is None
    given = planned(capsys, path, "--gpus", "8", "--pair-tokens", "800")
    assert given["step_s"] < plan["step_s"] / 50
    main(["plan", path, "--gpus", "8"])
    assert "With 800 positions per pair" in capsys.readouterr().out


def test_lengths_and_pairs_of_local_files_are_read(capsys, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(("x" * 3999 + "\n") * 7)
    path = str(EXAMPLES / "llama3_8b.yaml")
    assumed = planned(capsys, path, "--gpus", "8", f"data.train={file}")["assumed"]
    assert (assumed["pair_tokens"], assumed["pairs"]) == (1000, 7)


def test_max_steps_ends_the_run_but_not_the_reference(capsys):
    path = str(EXAMPLES / "llama3_8b.yaml")
    words = (path, "--gpus", "8", "--pairs", "10000", "training.global_batch_pairs=32")
    whole = planned(capsys, *words)
    short = planned(capsys, *words, "training.max_steps=50")
    assert (whole["trained_pairs"], short["trained_pairs"]) == (10000, 50 * 32)
    assert short["reference_cache_s"] == whole["reference_cache_s"] > 0
    training_s = short["days"] * 86400 - short["reference_cache_s"]
    assert training_s == pytest.approx(50 * short["step_s"])
    longer = planned(capsys, *words, "training.max_steps=1000")
    assert longer["days"] == whole["days"]  # the epoch ends first


@pytest.mark.parametrize(
    ("overrides", "pairs"),
    [
        (["sdpo.steps=[{}, {}]"], 8000),
        (["sdpo.steps=[{}, {}]", "training.max_steps=100"], 2 * 100 * 16),  # of each step
        (["sdpo.steps=[{max_steps: 10}, {}]"], 10 * 16 + 4000),
        (["sdpo.steps=[{fraction: 0.25, epochs: 3}, {fraction: 0.75}]"], 6000 + 6000),
        (["sdpo.steps=[{}, {}]", "sdpo.only=2"], 4000),
    ],
)
def test_length_of_sdpo_is_that_of_its_steps(overrides, pairs):
    config = load_config(
        EXAMPLES / "llama3_8b.yaml",
        [*overrides, "training.global_batch_pairs=16", "checkpoint.keep_best=0"],
        optional=SECTIONS,
    )
    model = find_model(config.model.path).sizes
    assert RunSizes.of(config, model, 8, Assumptions(pairs=8000)).trained_pairs == pairs


def test_advice_fits_and_leaves_headroom():
    # The balanced split gives early stages, which keep most rows, more layers than fit.
    run = run_of(
        "llama3_8b", 8, "layout={pipeline: 4}", "data.row_tokens=12288",
        "objective.layers=[0.5, 0.6, 0.69, 0.8]", "training.global_batch_pairs=512",
    )  # fmt: skip
    split = balanced_split(run, H100)
    assert split is not None
    small = replace(H100, memory_bytes=Plan.of(split.run, H100).largest.total - 1e9)
    assert not Plan.of(split.run, small).fits
    advice = Plan.of(run, small).advice()
    assert all(Plan.of(advice[-1].run, small).largest.total <= small.usable_bytes for _ in advice)


def test_what_fits_tightly_is_reported():
    run = run_of("llama3_8b_full", 8)
    total = Plan.of(run, H100).largest.total
    tight = Plan.of(run, replace(H100, memory_bytes=total * 1.03))
    assert tight.fits and tight.is_tight and "97% of the memory" in tight.warnings()[-1]
    roomy = Plan.of(run, replace(H100, memory_bytes=total * 1.2))
    assert not roomy.is_tight and not roomy.warnings()


def test_the_cheapest_recomputation_fits_and_one_layer_less_does_not():
    run = run_of("llama3_8b_full", 8, "layout=null", "data.row_tokens=8192", "layout.tensor=2")
    smaller = replace(H100, memory_bytes=60e9 / (1 - H100.headroom))
    choice = cheapest_recompute(run, smaller)
    assert choice is not None and choice.run.recompute_layers is not None
    layers = choice.run.recompute_layers
    assert 1 < layers < 32
    less = replace(choice.run, recompute_layers=layers - 1)
    exact = replace(smaller, memory_bytes=60e9)
    assert fits(run_memory(choice.run, exact), exact)
    assert not fits(run_memory(less, exact), exact)


def test_the_balanced_split_gives_stages_with_heads_fewer_layers():
    run = run_of("qwen2_5_7b", 8, "layout={pipeline: 4}", "objective.layers=[10, 12, 13]")
    choice = balanced_split(run, H100)
    assert choice is not None
    split = choice.run.layout.pipeline_layers
    assert split is not None and sum(split) == 28
    assert split[3] < split[0]
    assert Plan.of(choice.run, H100).time.step < Plan.of(run, H100).time.step
    (advice,) = Plan.of(run, H100).advice()  # interleaving is better still
    assert Plan.of(advice.run, H100).time.step < Plan.of(choice.run, H100).time.step
    by_hand = "layout={pipeline: 3, pipeline_layers: [10, 9, 9]}"
    run = run_of("qwen2_5_7b", 6, by_hand, "objective.layers=[10, 12, 13]")
    assert balanced_split(run, H100) in Plan.of(run, H100).advice()
