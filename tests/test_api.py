"""The verbs as Python functions: what they are given, and a run."""

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pytest

import megatron_idpo
from megatron_idpo.cli.train import OPTIONAL, REQUIRED
from megatron_idpo.config.from_python import as_command_line
from megatron_idpo.config.load import load_config
from megatron_idpo.errors import EXIT_PREEMPTED, ConfigError
from megatron_idpo.mcore.parallel.world import catch_stop_signals

from .train.tiny_run import SIZES, write_files

PAIRS = [{"prompt": "a", "chosen": "b", "rejected": "c"}]


def sections(root: Path) -> dict[str, Any]:
    return {
        "model": {"path": root / "model", "dtype": "fp32"},
        "data": {"train": PAIRS, "row_tokens": 128, "max_length": 96, "num_workers": 1},
        "optimizer": {"lr": 1e-3},
        "training": {"output": root / "run", "global_batch_pairs": 4},
    }


def read(config: Any, **overrides: Any) -> Any:
    with as_command_line(config, overrides) as (path, words):
        return load_config(path, words, required=REQUIRED, optional=OPTIONAL)


def test_a_mapping_a_path_and_a_run_config_mean_the_same(tmp_path):
    from_mapping = read(sections(tmp_path), lora={"rank": 4}, optimizer={"lr": 0.5})
    assert from_mapping.lora.rank == 4 and from_mapping.optimizer.lr == 0.5
    assert from_mapping.training.global_batch_pairs == 4
    file = tmp_path / "run.yaml"
    file.write_text(from_mapping.dump())
    assert read(file) == read(str(file)) == read(from_mapping) == from_mapping
    assert read(from_mapping, lora=None).lora is None
    with pytest.raises(ConfigError, match="lr: is 3; give a mapping of fields"):
        read(file, lr=3)


def test_records_and_datasets_are_sources(tmp_path):
    from datasets import Dataset

    both = [{"path": Dataset.from_list(PAIRS), "weight": 2.0}, {"path": PAIRS}, "more.jsonl"]
    config = read(sections(tmp_path), data={"eval": both})
    (train,), (first, second, third) = config.data.train, config.data.eval
    assert train.path == first.path == second.path and third.path == "more.jsonl"
    assert (first.weight, second.weight) == (2.0, 1.0)
    assert Path(train.path).parent == tmp_path / "run" / "records"
    assert [json.loads(line) for line in Path(train.path).read_text().splitlines()] == PAIRS


def test_records_are_kept_in_the_output_however_it_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = sections(Path("~"))
    for output, overrides in {
        "run": {"training": {"epochs": 2}},
        "other": {"training": {"output": "~/other"}},
    }.items():
        (train,) = read(config, **overrides).data.train
        assert Path(train.path).parent == tmp_path / output / "records"
        assert Path(train.path).exists()
    prompts = {"output": "~/prompts"}
    with as_command_line({"evaluate": prompts}, {"generate": {"prompts": PAIRS}}) as (_, words):
        assert str(tmp_path / "prompts" / "records") in words[0]


def test_values_of_numpy_and_torch_are_read(tmp_path):
    import numpy as np
    import torch

    values = {"model": {"dtype": torch.float32}, "optimizer": {"lr": np.float64(0.5)}}
    config = read(sections(tmp_path), **values, objective={"layers": np.array([1, 2]).tolist()})
    assert config.model.dtype == "fp32" and config.optimizer.lr == 0.5


def test_a_record_may_have_a_column_path(tmp_path):
    records = [{**pair, "path": "page.html"} for pair in PAIRS]
    (train,) = read(sections(tmp_path), data={"train": records}).data.train
    assert json.loads(Path(train.path).read_text()) == records[0]


def wrong_objects() -> dict[str, tuple[dict[str, Any], str]]:
    import pandas
    from datasets import Dataset, DatasetDict
    from peft import LoraConfig as PeftLora

    splits = DatasetDict(train=Dataset.from_list(PAIRS), test=Dataset.from_list(PAIRS))
    dated = [PAIRS[0], {**PAIRS[0], "when": pandas.Timestamp(0)}]
    frame = pandas.DataFrame(PAIRS)
    return {
        "splits": (
            {"data": {"train": splits}},
            r"^data.train: is a DatasetDict with the splits train, test; give .*dataset\['train'\]",
        ),
        "frame": ({"data": {"train": frame}}, "^data.train: is an object of type DataFrame; give"),
        "date": ({"data": {"eval": dated}}, r"^data.eval\[1\]: .*Timestamp.*; convert it"),
        "text": ({"data": {"train": [PAIRS, "x", 3]}}, "^data.train.2: .* int; give a list"),
        "adapter": ({"lora": PeftLora()}, "^lora: is an object of type LoraConfig; give plain"),
        "field": ({"lora": {"rank": {1}}}, "^lora.rank: is an object of type set; give plain"),
    }


@pytest.mark.parametrize("name", ["splits", "frame", "date", "text", "adapter", "field"])
def test_objects_without_a_meaning_are_refused_by_name(name, tmp_path):
    overrides, message = wrong_objects()[name]
    with pytest.raises(ConfigError, match=message):
        read(sections(tmp_path), **overrides)


def test_locations_are_those_of_python(tmp_path):
    config = sections(tmp_path)
    config["training"] |= {"batch_size": 4}
    with pytest.raises(ConfigError) as found:
        read(config, optimizer={"learning_rate": 1e-4})
    locations = {problem.location for problem in found.value.problems}
    assert locations == {"training.batch_size", "optimizer.learning_rate (keyword argument)"}
    assert "batch_size: unknown field" in str(found.value)


def test_a_verb_that_was_stopped_does_not_return(tmp_path):
    with (
        patch("megatron_idpo.cli.train.score", return_value=EXIT_PREEMPTED),
        pytest.raises(SystemExit, match=str(EXIT_PREEMPTED)),
    ):
        megatron_idpo.score(sections(tmp_path))


def test_another_thread_leaves_signals_to_the_caller():
    before = signal.getsignal(signal.SIGTERM)

    def handlers() -> bool:
        with catch_stop_signals() as stop_flag:
            return signal.getsignal(signal.SIGTERM) is before and not stop_flag.stop_requested

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(handlers).result()


def test_public_names_are_lazy():
    script = (
        "import sys, megatron_idpo; assert 'train' in dir(megatron_idpo)\n"
        "print({'torch', 'pydantic'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.stdout == "set()\n", shown.stderr
    assert all(getattr(megatron_idpo, name) is not None for name in megatron_idpo.__all__)


def published(result: Any, base: Path) -> dict[str, Any]:
    """What others read of an export, from another directory."""
    import torch
    from peft import PeftModel
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    with TemporaryDirectory() as elsewhere, chdir(elsewhere):
        model = AutoModelForCausalLM.from_pretrained(result.model_directory.resolve())
        adapted = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base.resolve()), result.adapter_directory.resolve()
        )
        tokens_NT = torch.arange(3, 20)[None]
        with torch.no_grad():
            difference = (model(tokens_NT).logits - adapted(tokens_NT).logits).abs().max()
    with safe_open(result.adapter_directory / "adapter_model.safetensors", framework="pt") as file:
        modules = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in file.keys()}
    settings = json.loads((result.adapter_directory / "adapter_config.json").read_text())
    return {
        "difference": float(difference),
        "model": {path.name for path in result.model_directory.iterdir()},
        "adapter": {path.name for path in result.adapter_directory.iterdir()},
        "modules": modules,
        "settings": settings,
        "card": (result.adapter_directory / "README.md").read_text(),
    }


def use_every_verb(config: dict[str, Any], prompts: list[dict[str, str]]) -> dict[str, Any]:
    """On a worker: from scoring to verdicts, all in one process, with Python objects as data."""
    megatron_idpo.score(config, objective={"layers": [2]})
    result = megatron_idpo.train(config, objective={"layers": [2]}, training={"max_steps": 2})
    with patch("megatron_idpo.evaluate.likelihood.summary.save_charts"):
        curves = megatron_idpo.likelihood(config, evaluate={"bootstrap_samples": 20})
    settings = {"prompts": prompts, "max_new_tokens": 4, "temperature": 0.0}
    answers = megatron_idpo.generate(config, generate=settings)
    template = Path(config["training"]["output"]).with_name("short.jinja")
    template.write_text("{% block user %}{{ answer_a }} or {{ answer_b }}{% endblock %}")
    judge = {"kind": "language_model", "model": config["model"]["path"], "template": template}
    verdicts = megatron_idpo.judge({"training": config["training"], "judge": judge})
    return {
        "is_complete": result.is_complete,
        "steps": [record["step"] for record in result.metrics],
        "layers": result.model().config.num_hidden_layers,
        "has_adapter": result.adapter_directory.exists(),
        "vocabulary": len(result.tokenizer()),
        "cache": (result.output / "reference" / "reference.parquet").exists(),
        "curves": sorted(path.name for path in curves.iterdir()),
        "answers": sorted(path.name for path in answers.rglob("*.jsonl")),
        "published": published(result, Path(config["model"]["path"])),
        "verdicts": [json.loads(path.read_text()) for path in verdicts.rglob("result.json")],
    }


@pytest.mark.distributed
def test_every_verb_works_in_one_process(tmp_path, workers):
    files = write_files(tmp_path)
    records = [json.loads(line) for line in files.train.read_text().splitlines()]
    config = sections(tmp_path)
    cache = str(tmp_path / "tokens")
    config["data"] |= {"train": records, "eval": records[:3], "cache": cache}
    prompts = [{"prompt": record["prompt"]} for record in records[:2]]
    (result,) = workers.run(use_every_verb, 1, {**config, "lora": {"rank": 2}}, prompts)
    assert result["is_complete"] and result["has_adapter"] and max(result["steps"]) == 2
    assert result["layers"] == SIZES["num_hidden_layers"] and result["vocabulary"] > 100
    assert result["cache"] and "likelihood.csv" in result["curves"]
    assert {"base.jsonl", "trained.jsonl"} <= set(result["answers"])
    assert len(result["verdicts"]) == 1
    check_what_vllm_reads(result["published"])


def check_what_vllm_reads(published: dict[str, Any]) -> None:
    """The files and fields of docs/training.md#publishing."""
    assert published["difference"] < 1e-4
    common = {"README.md", "layers.png", "tokenizer.json", "tokenizer_config.json"}
    assert common | {"config.json", "model.safetensors"} <= published["model"]
    assert common | {"adapter_config.json", "adapter_model.safetensors"} <= published["adapter"]
    weights = [name for name in published["model"] if Path(name).suffix in (".safetensors", ".bin")]
    assert weights == ["model.safetensors"], "vLLM reads every file with such a name"
    settings = published["settings"]
    assert settings["r"] == 2 and settings["lora_alpha"] and settings["bias"] == "none"
    assert not settings.get("modules_to_save") and not settings.get("use_dora")
    assert set(settings["target_modules"]) == published["modules"]
    assert not Path(settings["base_model_name_or_path"]).is_absolute()
    assert "(layers.png)" in published["card"]
