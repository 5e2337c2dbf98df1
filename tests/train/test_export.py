"""Exports: merged weights, the adapter, and the chat template of the training data."""

import json
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from megatron_idpo.convert.hf_io.tokenizer_files import read_json_object
from megatron_idpo.errors import CheckpointError, DataError
from megatron_idpo.train.export import CHAT_TEMPLATE, has_chat_template

from .tiny_run import LORA, assembled, exported, relative_difference, run, write_config

pytestmark = pytest.mark.distributed

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<s>{% endfor %}"
END_TOKENS = [2, 1]
"""EOS of the model, and the end of turn of the template."""


WEIGHT_TOLERANCE = 1e-5
"""In units of a tensor's root mean square, as in `test_loop.py`; without the gather 0.2."""


def export(file: str, fill: float, *, full_disk: bool = False) -> None:
    """Export a model whose adapters' B, or final norm in full training, are filled with a value."""
    from unittest.mock import patch

    from megatron_idpo.train.export import export_result

    with assembled(file) as trainer:
        policy = trainer.policy
        if policy.adapters is None:
            policy.chunks[-1].decoder.final_layernorm.weight.data.fill_(fill)
        else:
            for tensor in policy.adapters.tensors():
                if tensor.side == "B":
                    tensor.parameter.data.fill_(fill)
        publish = patch("megatron_idpo.storage.atomic.publish_directory", side_effect=_full)
        with publish if full_disk else nullcontext():
            export_result(trainer.config, policy, trainer.output, show_progress=False)


def _full(*args: Any, **kwargs: Any) -> None:
    raise CheckpointError.at("hf", "cannot be written: No space left on device")


def test_full_training_exports_no_adapter(tiny, workers, tmp_path):
    workers.run(export, 1, write_config(tiny, tmp_path / "run"), 3.0)
    weights = exported(tmp_path / "run")
    assert weights["model.norm.weight"].eq(3).all()
    names = {path.name for path in (tmp_path / "run" / "hf").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not (tmp_path / "run" / "adapter").exists()


def test_export_gathers_the_weights_of_the_last_step(tiny, workers, tmp_path):
    """No forward pass follows it: there is no evaluation."""
    for ranks in (1, 2):
        file = write_config(tiny, tmp_path / f"{ranks}", training={"max_steps": 2})
        assert [outcome.code for outcome in workers.run(run, ranks, file)] == [0] * ranks
    difference = relative_difference(exported(tmp_path / "2"), exported(tmp_path / "1"))
    assert difference <= WEIGHT_TOLERANCE


def test_adapters_are_merged_and_exported(tiny, workers, tmp_path):
    from safetensors.torch import load_file

    data = {"chat_template": TEMPLATE}
    file = write_config(tiny, tmp_path / "run", data=data, lora=LORA, layout={"pipeline": 2})
    (tiny.model / "LICENSE").write_text("Do as you like.")
    try:
        workers.run(export, 2, file, 0.5)
    finally:
        (tiny.model / "LICENSE").unlink()
    base = load_file(tiny.model / "model.safetensors")
    merged = exported(tmp_path / "run")
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert len(changed) == 7 * 4 and all("_proj" in name for name in changed)
    for name in changed:
        location = f"base_model.model.{name.removesuffix('.weight')}"
        delta = 2.0 * adapter[f"{location}.lora_B.weight"] @ adapter[f"{location}.lora_A.weight"]
        torch.testing.assert_close(merged[name], base[name] + delta, rtol=0, atol=1e-6)
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    # Relative to the adapter: a path of this machine is not published.
    base_model = tmp_path / "run" / "adapter" / settings["base_model_name_or_path"]
    assert not settings["base_model_name_or_path"].startswith("/") and settings["r"] == 4
    assert base_model.resolve() == tiny.model.resolve()
    for directory in ("hf", "adapter"):
        assert str(tiny.root) not in (tmp_path / "run" / directory / "README.md").read_text()
        assert (tmp_path / "run" / directory / "LICENSE").read_text() == "Do as you like."
    # Programs that load the base model find the template and the end tokens here.
    assert (tmp_path / "run" / "adapter" / CHAT_TEMPLATE).read_text() == TEMPLATE
    generation = read_json_object(tmp_path / "run" / "adapter" / "generation_config.json")
    assert generation["eos_token_id"] == END_TOKENS


def test_export_in_another_dtype(tiny, workers, tmp_path):
    workers.run(export, 1, write_config(tiny, tmp_path / "run", export={"dtype": "bf16"}), 3.0)
    assert {weight.dtype for weight in exported(tmp_path / "run").values()} == {torch.bfloat16}
    assert read_json_object(tmp_path / "run" / "hf" / "config.json")["dtype"] == "bfloat16"


def lost_template(file: str) -> str:
    """The error message on this rank if the second rank cannot read the template."""
    from unittest.mock import patch

    import torch.distributed as dist

    from megatron_idpo.train import export as module

    read = module.read_template

    def read_on_rank(value: str | None) -> str | None:
        return read("/nowhere/template.jinja" if dist.get_rank() == 1 else value)

    try:
        with patch.object(module, "read_template", read_on_rank):
            export(file, 3.0)
    except DataError as error:
        return str(error)
    return ""


def test_unreadable_template_is_reported_on_all_ranks(tiny, workers, tmp_path):
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    data = {"chat_template": str(tmp_path / "template.jinja")}
    messages = workers.run(lost_template, 2, write_config(tiny, tmp_path / "run", data=data))
    assert all("cannot read '/nowhere/template.jinja'" in message for message in messages)
    assert not (tmp_path / "run" / "hf").exists()


def test_export_is_replaced_atomically(tiny, workers, tmp_path):
    file = write_config(tiny, tmp_path / "run")
    workers.run(export, 1, file, 3.0)
    workers.run(export, 1, file, 4.0)
    with pytest.raises(CheckpointError, match="No space left"):
        workers.run(export, 1, file, 5.0, full_disk=True)
    assert exported(tmp_path / "run")["model.norm.weight"].eq(4).all()
    names = [path.name for path in (tmp_path / "run").iterdir()]
    assert sorted(name for name in names if "hf" in name) == ["hf"]


@pytest.mark.parametrize("as_file", [False, True])
def test_chat_template_of_the_training_data_is_exported(tiny, workers, tmp_path, as_file):
    from transformers import AutoTokenizer

    template = TEMPLATE
    if as_file:
        (tmp_path / "chat.jinja").write_text(TEMPLATE)
        template = str(tmp_path / "chat.jinja")
    file = write_config(tiny, tmp_path / "run", data={"chat_template": template})
    workers.run(export, 1, file, 3.0)
    model = tmp_path / "run" / "hf"
    assert has_chat_template(model.iterdir()) and (model / CHAT_TEMPLATE).read_text() == TEMPLATE
    messages = [{"role": "user", "content": "hi"}]
    text = AutoTokenizer.from_pretrained(model).apply_chat_template(messages, tokenize=False)
    assert text == "<user>hi<s>"
    assert read_json_object(model / "generation_config.json")["eos_token_id"] == END_TOKENS


def test_has_chat_template(tmp_path):
    assert not has_chat_template(tmp_path.iterdir())
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text('{"eos_token": "</s>"}')
    assert not has_chat_template(tmp_path.iterdir())
    settings.write_text(json.dumps({"chat_template": TEMPLATE}))
    assert has_chat_template(tmp_path.iterdir())
    settings.unlink()
    (tmp_path / CHAT_TEMPLATE).write_text(TEMPLATE)
    assert has_chat_template(tmp_path.iterdir())
