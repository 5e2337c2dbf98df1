"""Checkpoints as they are published: what Transformers and PEFT accept is accepted here."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_idpo.convert.hf_to_megatron import open_hf
from megatron_idpo.convert.model_source import open_model
from megatron_idpo.errors import CheckpointError
from megatron_idpo.lora.adapter_config import read_peft_settings
from megatron_idpo.testing import write_tiny_hf_model

INV_FREQ = "model.layers.{}.self_attn.rotary_emb.inv_freq"


def loads_in_transformers(directory: Path) -> bool:
    model = AutoModelForCausalLM.from_pretrained(directory)
    return bool(model(torch.arange(4)[None]).logits.isfinite().all())


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "only in the index"])
def test_stale_rotary_frequencies_are_ignored(tmp_path: Path, stored: bool) -> None:
    hf = write_tiny_hf_model(tmp_path / "hf", "llama", num_hidden_layers=2)
    weights = load_file(hf / "model.safetensors")
    stale = {INV_FREQ.format(layer): torch.ones(4) for layer in range(2)}
    stale["model.rotary_emb.inv_freq"] = torch.ones(4)
    (hf / "model.safetensors").unlink()
    shard = "model-00001-of-00001.safetensors"
    save_file(weights | (stale if stored else {}), hf / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(sorted(weights | stale), shard)}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    assert loads_in_transformers(hf)
    checkpoint, architecture = open_hf(hf)
    assert architecture.num_layers == 2 and torch.equal(
        checkpoint.read("model.norm.weight"), weights["model.norm.weight"]
    )


@pytest.mark.parametrize(
    ("text", "offset", "accepted"),
    [("[PAD]", 0, True), ("<pad>", 0, True), ("[PAD]", 1, False), ("zz", 0, False)],
)
def test_padding_token_behind_the_vocabulary(
    tmp_path: Path, text: str, offset: int, accepted: bool
) -> None:
    hf = write_tiny_hf_model(tmp_path / "hf", "llama", num_hidden_layers=1)
    (hf / "vocab.json").write_text(json.dumps({"a": 0}))
    (hf / "added_tokens.json").write_text(json.dumps({text: 256 + offset}))
    assert loads_in_transformers(hf)
    if accepted:
        assert open_model(str(hf)).architecture.vocab_size == 256
    else:
        with pytest.raises(CheckpointError, match="the model has no embedding for it"):
            open_model(str(hf))


@pytest.mark.parametrize(
    "excluded", [["k_proj"], "(.*down_proj|.*k_proj)", ["model.layers.1.mlp.up_proj", "k_proj"]]
)
def test_excluded_modules_have_no_adapter_as_in_peft(
    tmp_path: Path, excluded: list[str] | str
) -> None:
    from peft import LoraConfig, get_peft_model

    hf = write_tiny_hf_model(tmp_path / "hf", "llama", num_hidden_layers=2)
    targets = ["q_proj", "k_proj", "up_proj", "down_proj"]
    settings = LoraConfig(r=2, target_modules=targets, exclude_modules=excluded)
    get_peft_model(AutoModelForCausalLM.from_pretrained(hf), settings).save_pretrained(
        tmp_path / "a"
    )
    names = load_file(tmp_path / "a/adapter_model.safetensors")
    adapted = [target for target in targets if any(target in name for name in names)]
    if "up_proj" in str(excluded):  # in one layer only, which no set of targets describes
        with pytest.raises(CheckpointError, match="excludes up_proj in some layers only"):
            read_peft_settings(tmp_path / "a")
    else:
        assert sorted(read_peft_settings(tmp_path / "a").projections) == sorted(adapted)
        assert "k_proj" not in adapted
