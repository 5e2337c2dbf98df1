"""The caches of a run: which changes of model, data and settings matter, and where they are."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import ConfigError
from megatron_idpo.reference.cache import CacheWriter
from megatron_idpo.reference.run_caches import cache_directory

from .tiny_cache import Files, fingerprint, logps, score_config


def check_caches(file: str, changes: Sequence[Sequence[str]]) -> list[str]:
    """On a rank: the error for each changed configuration; empty if it can use the cache."""
    from megatron_idpo.convert.model_source import FrozenModel, open_model
    from megatron_idpo.data.run_pairs import load_run_pairs
    from megatron_idpo.errors import CheckpointError
    from megatron_idpo.reference.run_caches import RunCaches

    messages = []
    for overrides in changes:
        config = load_config(file, overrides, required=("model", "data"), optional=OPTIONAL)
        model = FrozenModel.of(open_model(config.model.path))
        caches = RunCaches.of(config, load_run_pairs(config), model)
        try:
            messages.append("" if caches.are_complete() else "not complete")
        except CheckpointError as error:
            messages.append(str(error))
    return messages


OPTIONAL = ("objective", "training", "reference")


@pytest.mark.distributed
def test_every_relevant_change_is_named(
    scored: Path, tiny: Files, workers: Any, tmp_path: Path
) -> None:
    """Changes that do not affect log-probabilities are accepted."""
    heavier = _copy(tiny.model, tmp_path / "heavier")
    with (heavier / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        last = weights.read(1)[0]
        weights.seek(-1, 2)
        weights.write(bytes([last ^ 1]))
    spelling = _copy(tiny.model, tmp_path / "spelling")
    settings = json.loads((spelling / "tokenizer.json").read_text())
    settings["added_tokens"][0]["normalized"] = not settings["added_tokens"][0]["normalized"]
    (spelling / "tokenizer.json").write_text(json.dumps(settings))
    other_pair = tmp_path / "other_pair.jsonl"
    records = [json.loads(line) for line in tiny.train.read_text().splitlines()]
    records[7]["chosen"] += " more"
    other_pair.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    changes = {
        (f"model.path={heavier}", f"model.tokenizer={tiny.model}"): "the model (weights",
        (f"model.tokenizer={spelling}",): "the tokenizer differs",
        ("data.chat_template='{{ messages[0].content }}'",): "the chat template differs",
        (f"data.train={other_pair}",): "the data (some token",
        ("data.truncation=drop",): "data.truncation was keep_start, is now drop",
        ("data.max_length=95",): "data.max_length was 96, is now 95",
        ("objective.norm=none",): "objective.norm was final, is now none",
        ("model.dtype=bf16",): "model.dtype was fp32, is now bf16",
        ("objective.layers=[2]",): "",
        ("objective.layers=[]", "objective.intermediate_weight=0.0"): "",
        ("data.row_tokens=192", "data.share_prompt=false", "data.trim_tokens=64"): "",
        (f"model.path={_copy(tiny.model, tmp_path / 'elsewhere')}",): "",
    }
    file = score_config(tiny, scored, objective={"layers": "all"})
    [answers] = workers.run(check_caches, 1, file, list(changes))
    for overrides, expected, message in zip(changes, changes.values(), answers, strict=True):
        if expected:
            assert expected in message, (overrides, message)
            assert (
                str(scored / "reference") in message
                and "set reference.cache to a new directory" in message
            )
        else:
            assert message == "", (overrides, message)


@pytest.mark.distributed
def test_missing_layers_are_named(tiny: Files, workers: Any, tmp_path: Path) -> None:
    from .tiny_cache import score

    file = score_config(tiny, tmp_path / "run", objective={"layers": [2]})
    workers.run(score, 1, file)
    [message] = workers.run(check_caches, 1, file, [["objective.layers=[1,2,3]"]])
    assert (
        "cache lacks layers 1, 3; set reference.cache to a new directory, or delete it to score"
        in message[0]
    )


def only_rank_0_sees(cache: Path) -> tuple[bool, list[Any]]:
    """Whether a cache is complete, and its tables, where other ranks do not see it."""
    from contextlib import nullcontext
    from unittest.mock import patch

    import torch.distributed as dist

    from megatron_idpo.reference import run_caches
    from megatron_idpo.reference.score import CachePart

    part: Any = CachePart(None, cache, fingerprint(), "training pairs")  # type: ignore[arg-type]
    caches = run_caches.RunCaches(cache, model=None, parts=(part,))  # type: ignore[arg-type]
    is_first = dist.get_rank() == 0
    with nullcontext() if is_first else patch.object(Path, "exists", return_value=False):
        return caches.are_complete(), [each.logps_PL2 for each in caches.open()]


@pytest.mark.distributed
def test_a_machine_that_remembers_the_absence_of_a_cache_can_use_it(
    workers: Any, tmp_path: Path
) -> None:
    """NFS: it looked before rank 0 had written the cache."""
    writer = CacheWriter(tmp_path, fingerprint())
    writer.add(logps())
    writer.finish()
    for is_complete, tables in workers.run(only_rank_0_sees, 2, tmp_path):
        assert is_complete
        np.testing.assert_array_equal(tables, [logps()])


def _copy(model: Path, target: Path) -> Path:
    shutil.copytree(model, target)
    return target


def _config(tmp_path: Path, text: str) -> RunConfig:
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {{path: m}}\ndata: {{train: t.jsonl}}\n{text}")
    return load_config(file, required=("model", "data"))


def test_directory_is_configured_or_in_the_output(tmp_path: Path) -> None:
    output = "training: {output: runs/x}\n"
    assert cache_directory(_config(tmp_path, output)) == Path("runs/x/reference")
    both = _config(tmp_path, f"{output}reference: {{cache: elsewhere}}")
    assert cache_directory(both) == Path("elsewhere")


def test_missing_directory_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reference\.cache.*no directory"):
        cache_directory(_config(tmp_path, ""))
