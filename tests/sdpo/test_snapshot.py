"""Snapshots: what a policy has become, in files that notice a change, whatever wrote them."""

import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_idpo.errors import CheckpointError
from megatron_idpo.mcore.parallel.layout import Layout

from .stepped_run import LORA, Files, stepped_config

pytestmark = pytest.mark.distributed

LAYOUTS = {"one": Layout(), "tensor": Layout(tensor=2), "pipeline": Layout(pipeline=2)}


def write(file: str, directory: Path, carry: bool) -> tuple[Any, dict[str, Tensor]]:
    """On every rank: a trained-looking policy's snapshot; and its merged weights before that."""
    from megatron_idpo.cli.train import OPTIONAL, REQUIRED
    from megatron_idpo.config.run_config import load_config
    from megatron_idpo.convert.megatron_to_hf import stored_value, whole_tensors
    from megatron_idpo.lora.merge import merged_value
    from megatron_idpo.mcore.parallel.world import joined_world, running
    from megatron_idpo.sdpo.snapshot import write_snapshot
    from megatron_idpo.train.build import build_policy
    from megatron_idpo.train.trainer import prepare

    config = load_config(file, required=REQUIRED, optional=OPTIONAL)
    with joined_world() as world:
        prepared = prepare(config, world)
        with running(config.layout.layout()):
            policy = build_policy(config, prepared.start, show_progress=False)
            value = stored_value
            if policy.adapters is not None:
                for _, parameter in policy.adapters.parameters():
                    parameter.data.fill_(0.03)
                value = merged_value(policy.adapters)
            named = whole_tensors(policy.chunks, policy.source.architecture, value)
            weights = {name: tensor.clone() for name, tensor in named}
            snapshot = write_snapshot(config, policy, directory, carry=carry)
    return snapshot, weights


def read(model: str, directory: Path, identity: str, layout: Layout) -> dict[str, Tensor]:
    """On every rank: the weights of a snapshot that was opened, its adapter left out."""
    from megatron_idpo.convert.frozen_model import FrozenModel
    from megatron_idpo.convert.megatron_to_hf import whole_tensors
    from megatron_idpo.convert.model_source import load_base, open_model
    from megatron_idpo.mcore.model.build import build_model
    from megatron_idpo.sdpo.snapshot import open_snapshot

    first = FrozenModel.of(open_model(model))
    opened = open_snapshot(directory, identity, first)
    assert opened.identity == identity
    layout.start()
    chunks = build_model(opened.source.architecture, layout)
    load_base(opened.source, chunks)
    return {
        name: tensor.clone() for name, tensor in whole_tensors(chunks, opened.source.architecture)
    }


def to_hf(snapshot: Path, target: Path) -> None:
    """On every rank: the verb `convert megatron-to-hf`."""
    from megatron_idpo.convert.megatron_to_hf import convert

    convert(snapshot, target)


def together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for part in parts for name, tensor in part.items()}


@pytest.fixture(scope="module")
def merged(
    tiny: Files, workers: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any, dict[str, Tensor]]:
    """A snapshot of merged weights, written by two tensor-parallel ranks; not to be changed."""
    root = tmp_path_factory.mktemp("merged")
    file = stepped_config(tiny, root / "run", layout={"tensor": 2})
    answers = workers.run(write, 2, file, root / "snapshot", False)
    return root / "snapshot", answers[0][0], together([weights for _, weights in answers])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_reads_what_was_merged_to_the_bit(
    tiny: Files, workers: Any, merged: Any, layout: str
) -> None:
    directory, snapshot, weights = merged
    ranks = LAYOUTS[layout].model_ranks
    arguments = (str(tiny.model), directory, snapshot.identity, LAYOUTS[layout])
    found = together(workers.run(read, ranks, *arguments))
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize("kind", ["merge", "carry"])
def test_its_identity_is_the_same_in_every_layout(
    tiny: Files, workers: Any, tmp_path: Path, kind: str
) -> None:
    found = []
    for name, layout in {"one": {}, "tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}}.items():
        file = stepped_config(tiny, tmp_path / name, kind, layout=layout)
        directory = tmp_path / f"{name}-snapshot"
        answers = workers.run(write, 2, file, directory, kind == "carry")
        assert answers[0][0] == answers[1][0]
        found.append(answers[0][0])
    assert len({one.identity for one in found}) == 1
    assert (found[0].base is None) == (kind == "merge")


def test_an_adapter_alone_is_small_and_for_peft(tiny: Files, workers: Any, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    directory = tmp_path / "snapshot"
    file = stepped_config(tiny, tmp_path / "run", "carry")
    [(snapshot, weights)] = workers.run(write, 1, file, directory, True)
    names = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert names == {"snapshot.json"} | adapter and set(snapshot.files) == adapter
    base = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32)
    with pytest.raises(CheckpointError, match="is an adapter for the first model"):
        workers.run(to_hf, 1, directory, tmp_path / "hf")
    theirs = PeftModel.from_pretrained(base, directory / "adapter").merge_and_unload()
    for name, tensor in theirs.state_dict().items():
        if name in weights:
            torch.testing.assert_close(tensor, weights[name], atol=1e-6, rtol=0)


def test_every_changed_or_missing_file_is_named(
    tiny: Files, workers: Any, tmp_path: Path, merged: Any
) -> None:
    directory, snapshot, _ = merged
    assert len(snapshot.files) > 4 and snapshot.total_bytes > 10**5
    for number, name in enumerate([*snapshot.files, "snapshot.json"]):
        for change in ("a byte", "the file"):
            copy = shutil.copytree(directory, tmp_path / f"{number} {change}")
            path = copy / name
            path.chmod(0o600)
            data = bytearray(path.read_bytes())
            data[-1 if name != "snapshot.json" else 5] ^= 1
            path.write_bytes(data)
            if change == "the file":
                path.unlink()
            with pytest.raises(CheckpointError) as raised:
                workers.run(read, 1, str(tiny.model), copy, snapshot.identity, Layout())
            assert str(path) in str(raised.value), (name, change)


def test_an_added_file_is_named(tiny: Files, workers: Any, tmp_path: Path, merged: Any) -> None:
    copy = shutil.copytree(merged[0], tmp_path / "copy")
    (copy / "huggingface" / "vocab.json").write_text("{}")
    message = r"huggingface/vocab\.json: is none of the files"
    with pytest.raises(CheckpointError, match=message):
        workers.run(read, 2, str(tiny.model), copy, merged[1].identity, Layout())
    with pytest.raises(CheckpointError, match=message):
        workers.run(to_hf, 1, copy, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_it_has_the_template_that_the_run_was_trained_with(
    tiny: Files, workers: Any, tmp_path: Path
) -> None:
    """As `hf/` has, and in place of the first model's own."""
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = shutil.copytree(tiny.model, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    file = stepped_config(
        tiny, tmp_path / "run", model={"path": str(model)}, data={"chat_template": template}
    )
    directory = tmp_path / "snapshot"
    [(snapshot, _), _] = workers.run(write, 2, file, directory, False)
    assert (directory / "huggingface" / "chat_template.jinja").read_text() == template
    assert "huggingface/chat_template.jinja" in snapshot.files
    workers.run(to_hf, 1, directory, tmp_path / "hf")
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == template


def test_rights_that_cannot_be_taken_away_stay(
    tiny: Files, workers: Any, tmp_path: Path, merged: Any
) -> None:
    """Rights to write go, others stay; a file system that has none is no mistake."""
    modes = [path.stat().st_mode & 0o777 for path in merged[0].rglob("*") if path.is_file()]
    umask = os.umask(0o022)
    os.umask(umask)
    assert {mode for mode in modes} <= {0o444 & ~umask, 0o400}
    file, directory = stepped_config(tiny, tmp_path / "run"), tmp_path / "snapshot"
    [snapshot] = workers.run(write_without_rights, 1, file, directory)
    assert workers.run(read, 1, str(tiny.model), directory, snapshot.identity, Layout())


def write_without_rights(file: str, directory: Path) -> Any:
    """A snapshot on a file system that knows no rights."""
    with patch("pathlib.Path.chmod", side_effect=PermissionError(1, "not permitted")):
        return write(file, directory, False)[0]


def test_another_snapshot_than_the_wanted_one(tiny: Files, workers: Any, merged: Any) -> None:
    with pytest.raises(CheckpointError, match="is another snapshot"):
        workers.run(read, 1, str(tiny.model), merged[0], "f" * 64, Layout())


def test_it_is_replaced_where_its_end_was_not_recorded(
    tiny: Files, workers: Any, tmp_path: Path
) -> None:
    directory = tmp_path / "snapshot"
    file = stepped_config(tiny, tmp_path / "run", lora={**LORA, "rank": 2})
    [(first, _)] = workers.run(write, 1, file, directory, False)
    [(second, _)] = workers.run(write, 1, file, directory, False)
    assert first.identity == second.identity
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match="holds something else than a checkpoint"):
        workers.run(write, 1, file, other, False)
    assert (other / "thesis.tex").read_text() == "mine"
