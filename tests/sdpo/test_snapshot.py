"""Snapshots: equal in every layout, and every change of a file is detected."""

import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_idpo.config.layout import Layout
from megatron_idpo.errors import CheckpointError
from megatron_idpo.testing import write_tiny_hf_model

from .stepped_run import LORA, Files, stepped_config

pytestmark = pytest.mark.distributed

LAYOUTS = {"one": Layout(), "tensor": Layout(tensor=2), "pipeline": Layout(pipeline=2)}


def write(file: str, directory: Path, carry: bool) -> tuple[Any, dict[str, Tensor]]:
    """Write a snapshot of a policy with filled adapters; returns it and the merged weights."""
    from megatron_idpo.cli.train import OPTIONAL, REQUIRED
    from megatron_idpo.config.load import load_config
    from megatron_idpo.convert.megatron_to_hf import stored_value, whole_tensors
    from megatron_idpo.lora.adapters import merged_value
    from megatron_idpo.mcore.parallel.world import distributed_world, running_layout
    from megatron_idpo.sdpo.snapshot import write_snapshot
    from megatron_idpo.train.policy import build_policy
    from megatron_idpo.train.setup import prepare

    config = load_config(file, required=REQUIRED, optional=OPTIONAL)
    with distributed_world() as world:
        prepared = prepare(config, world)
        with running_layout(config.layout):
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
    """Weights of an opened snapshot, without its adapter."""
    from megatron_idpo.convert.megatron_to_hf import whole_tensors
    from megatron_idpo.convert.model_source import FrozenModel, load_base, open_model
    from megatron_idpo.mcore.model.build import build_model
    from megatron_idpo.mcore.parallel.groups import start_layout
    from megatron_idpo.sdpo.snapshot import open_snapshot

    first = FrozenModel.of(open_model(model))
    opened = open_snapshot(directory, identity, first)
    assert opened.identity == identity
    start_layout(layout)
    chunks = build_model(opened.source.architecture, layout)
    load_base(opened.source, chunks)
    return {
        name: tensor.clone() for name, tensor in whole_tensors(chunks, opened.source.architecture)
    }


def to_hf(snapshot: Path, target: Path) -> None:
    """The verb `convert megatron-to-hf`."""
    from megatron_idpo.convert.megatron_to_hf import convert

    convert(snapshot, target)


def together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for part in parts for name, tensor in part.items()}


@pytest.fixture(scope="module")
def merged(
    tiny: Files, workers: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any, dict[str, Tensor]]:
    """A snapshot with merged weights, written by two tensor-parallel ranks; not to be changed."""
    root = tmp_path_factory.mktemp("merged")
    file = stepped_config(tiny, root / "run", layout={"tensor": 2})
    answers = workers.run(write, 2, file, root / "snapshot", False)
    return root / "snapshot", answers[0][0], together([weights for _, weights in answers])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_reads_merged_weights_bitwise(
    tiny: Files, workers: Any, merged: Any, layout: str
) -> None:
    directory, snapshot, weights = merged
    ranks = LAYOUTS[layout].model_ranks
    arguments = (str(tiny.model), directory, snapshot.identity, LAYOUTS[layout])
    restored = together(workers.run(read, ranks, *arguments))
    assert restored.keys() == weights.keys()
    assert all(torch.equal(restored[name], weights[name]) for name in weights)


@pytest.mark.parametrize("kind", ["merge", "carry"])
def test_identity_is_equal_in_every_layout(
    tiny: Files, workers: Any, tmp_path: Path, kind: str
) -> None:
    written = []
    for name, layout in {"one": {}, "tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}}.items():
        file = stepped_config(tiny, tmp_path / name, kind, layout=layout)
        directory = tmp_path / f"{name}-snapshot"
        answers = workers.run(write, 2, file, directory, kind == "carry")
        assert answers[0][0] == answers[1][0]
        written.append(answers[0][0])
    assert len({snapshot.identity for snapshot in written}) == 1
    assert (written[0].base is None) == (kind == "merge")


def test_carried_adapter_is_read_by_peft(tiny: Files, workers: Any, tmp_path: Path) -> None:
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


def test_changed_or_missing_file_is_reported(
    tiny: Files, workers: Any, tmp_path: Path, merged: Any
) -> None:
    directory, snapshot, _ = merged
    assert len(snapshot.files) > 4 and snapshot.total_bytes > 10**5
    for number, name in enumerate([*snapshot.files, "snapshot.json"]):
        # A missing file is found by name, before any content is read: one of them suffices.
        for change in ("a byte", "the file")[: 2 if number == 0 else 1]:
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


def test_added_file_is_reported(tiny: Files, workers: Any, tmp_path: Path, merged: Any) -> None:
    copy = shutil.copytree(merged[0], tmp_path / "copy")
    (copy / "huggingface" / "vocab.json").write_text("{}")
    message = r"huggingface/vocab\.json: is not listed in snapshot"
    with pytest.raises(CheckpointError, match=message):
        workers.run(read, 2, str(tiny.model), copy, merged[1].identity, Layout())
    with pytest.raises(CheckpointError, match=message):
        workers.run(to_hf, 1, copy, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_snapshot_has_the_chat_template_of_the_training_data(
    tiny: Files, workers: Any, tmp_path: Path
) -> None:
    """Like `hf/`, and in place of the first model's template."""
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


def test_files_are_read_only_if_possible(
    tiny: Files, workers: Any, tmp_path: Path, merged: Any
) -> None:
    """Write permissions are removed, others stay; a file system without permissions works."""
    modes = [path.stat().st_mode & 0o777 for path in merged[0].rglob("*") if path.is_file()]
    umask = os.umask(0o022)
    os.umask(umask)
    assert {mode for mode in modes} <= {0o444 & ~umask, 0o400}
    file, directory = stepped_config(tiny, tmp_path / "run"), tmp_path / "snapshot"
    [snapshot] = workers.run(write_without_permissions, 1, file, directory)
    assert workers.run(read, 1, str(tiny.model), directory, snapshot.identity, Layout())


def write_without_permissions(file: str, directory: Path) -> Any:
    """Write a snapshot on a file system without permissions."""
    with patch("pathlib.Path.chmod", side_effect=PermissionError(1, "not permitted")):
        return write(file, directory, False)[0]


def test_other_snapshot_is_rejected(tiny: Files, workers: Any, merged: Any) -> None:
    with pytest.raises(CheckpointError, match="is not the one in the run's manifest"):
        workers.run(read, 1, str(tiny.model), merged[0], "f" * 64, Layout())


def test_unrecorded_snapshot_is_replaced(tiny: Files, workers: Any, tmp_path: Path) -> None:
    directory = tmp_path / "snapshot"
    file = stepped_config(tiny, tmp_path / "run", lora={**LORA, "rank": 2})
    [(first, _)] = workers.run(write, 1, file, directory, False)
    [(second, _)] = workers.run(write, 1, file, directory, False)
    assert first.identity == second.identity
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not a checkpoint"):
        workers.run(write, 1, file, other, False)
    assert (other / "thesis.tex").read_text() == "mine"


# ---- identity -----------------------------------------------------------------------------------

Named = list[tuple[str, Tensor]]


def of_tensors(cases: list[Named]) -> list[str]:
    from megatron_idpo.mcore.parallel.groups import start_layout
    from megatron_idpo.sdpo.snapshot import tensors_identity

    start_layout(Layout())
    return [tensors_identity(iter(case)) for case in cases]


def of_model(path: str, layout: Layout) -> str:
    from megatron_idpo.convert.megatron_to_hf import whole_tensors
    from megatron_idpo.convert.model_source import load_base, open_model
    from megatron_idpo.mcore.model.build import build_model
    from megatron_idpo.mcore.parallel.groups import start_layout
    from megatron_idpo.sdpo.snapshot import tensors_identity

    source = open_model(path)
    start_layout(layout)
    chunks = build_model(source.architecture, layout)
    load_base(source, chunks)
    return tensors_identity(whole_tensors(chunks, source.architecture))


def test_identity_covers_name_dtype_shape_and_bits_but_not_order(workers: Any) -> None:
    one, two = torch.arange(6.0).view(2, 3), torch.ones(2, dtype=torch.bfloat16)
    named: Named = [("one", one), ("two", two)]
    changed = one.clone()
    changed.view(torch.uint8)[-1, -1] ^= 1
    others: list[Named] = [
        [("one", changed), ("two", two)],
        [("other", one), ("two", two)],
        [("one", one.view(3, 2)), ("two", two)],
        [("one", one), ("two", two.half())],
        [("one", one)],
        [("one", -0.0 * one), ("two", two)],
        [("one", 0.0 * one), ("two", two)],
    ]
    same: list[Named] = [named[::-1], [("one", one.t().contiguous().t()), ("two", two)]]
    (identities,) = workers.run(of_tensors, 1, [named, *same, *others])
    assert identities[0] == identities[1] == identities[2]
    assert len(set(identities)) == 1 + len(others)


def test_identity_of_a_tied_model_is_equal_in_every_layout(workers: Any, tmp_path: Any) -> None:
    """With a copy of the tied embedding on the last stage, and a padded vocabulary."""
    sizes = {"vocab_size": 131, "num_hidden_layers": 4, "tie_word_embeddings": True}
    path = str(write_tiny_hf_model(tmp_path / "model", "llama", seed=3, **sizes))
    (one,) = workers.run(of_model, 1, path, Layout())
    for ranks, layout in (
        (2, Layout(tensor=2)),
        (2, Layout()),
        (2, Layout(pipeline=2, virtual_pipeline=2)),
    ):
        assert set(workers.run(of_model, ranks, path, layout)) == {one}, layout
