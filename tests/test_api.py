"""The verbs as Python functions: what they are given, and a run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import megatron_idpo
from megatron_idpo.api import _configuration
from megatron_idpo.cli.train import OPTIONAL, REQUIRED
from megatron_idpo.config.load import load_config
from megatron_idpo.errors import ConfigError

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
    with _configuration(config, overrides) as (path, words):
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


def test_public_names_are_lazy():
    script = (
        "import sys, megatron_idpo; assert 'train' in dir(megatron_idpo)\n"
        "print({'torch', 'pydantic'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.stdout == "set()\n", shown.stderr
    assert all(getattr(megatron_idpo, name) is not None for name in megatron_idpo.__all__)


def train(config: dict[str, Any]) -> dict[str, Any]:
    result = megatron_idpo.train(config, objective={"layers": [2]}, training={"max_steps": 2})
    model = result.model()
    return {
        "is_complete": result.is_complete,
        "steps": [record["step"] for record in result.metrics],
        "layers": model.config.num_hidden_layers,
        "has_adapter": result.adapter_directory.exists(),
        "vocabulary": len(result.tokenizer()),
    }


@pytest.mark.distributed
def test_train_returns_metrics_and_the_model(tmp_path, workers):
    files = write_files(tmp_path)
    records = [json.loads(line) for line in files.train.read_text().splitlines()]
    config = sections(tmp_path)
    config["data"] |= {"train": records, "cache": str(tmp_path / "tokens")}
    (result,) = workers.run(train, 1, {**config, "lora": {"rank": 2}})
    assert result["is_complete"] and result["has_adapter"] and max(result["steps"]) == 2
    assert result["layers"] == SIZES["num_hidden_layers"] and result["vocabulary"] > 100
