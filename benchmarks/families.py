"""Tiny models of 25 families through the command line: train a step, export, load in Transformers.

    OMP_NUM_THREADS=1 python benchmarks/families.py DIRECTORY [NAME ...]

Each model is made by `AutoModelForCausalLM.from_config` with Transformers' config class, so that
nothing here knows which settings this package supports. `megatron-idpo train` runs in a forked
process. A model works if training ends with 0 and Transformers computes finite logits with the
export that differ from the base model's; a refusal is printed as the user reads it.
"""

import argparse
import io
import json
import os
import sys
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from megatron_idpo.cli.main import main as megatron_idpo
from megatron_idpo.mcore.megatron_warnings import suppress_megatron_warnings

BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2": ("llama", {}),
    "Llama 3.1": ("llama", {"rope_parameters": _LLAMA3}),
    "Yi": (
        "llama",
        {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
    ),
    "Mistral": ("mistral", {"sliding_window": None}),
    "Ministral 3": ("ministral3", {}),
    "Mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2.5": ("qwen2", {}),
    "Qwen3": ("qwen3", {"head_dim": 16}),
    "Qwen3-MoE": (
        "qwen3_moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "Qwen3.5": ("qwen3_5_text", {}),
    "Llama 4": ("llama4_text", {"num_local_experts": 2, "intermediate_size_mlp": 64}),
    "Gemma 2": ("gemma2", {"head_dim": 8}),
    "Gemma 3": ("gemma3_text", {"head_dim": 8}),
    "Phi-3": ("phi3", {}),
    "DeepSeek-V2": ("deepseek_v2", {**_MLA, "topk_method": "greedy"}),
    "DeepSeek-V3": ("deepseek_v3", _MLA),
    "gpt-oss": ("gpt_oss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "GLM-4": ("glm4", {"head_dim": 8}),
    "GLM-4.5": (
        "glm4_moe",
        {
            "head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", {}),
    "SmolLM3": ("smollm3", {}),
    "Granite": ("granite", {}),
    "Falcon": ("falcon", {}),
    "Seed-OSS": ("seed_oss", {"head_dim": 8}),
}


def write_model(directory: Path, model_type: str, fields: Mapping[str, Any]) -> None:
    """A random model as Transformers saves it, with a tokenizer of characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

    config = CONFIG_MAPPING[model_type](**{**BASE, **fields})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<s>", "</s>", *alphabet]
    backend = Tokenizer(models.BPE({name: n for n, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(directory)


def run(root: Path, model_type: str, fields: Mapping[str, Any]) -> str:
    """Make one model and train it; returns "ok" or what was printed last."""
    root.mkdir(parents=True, exist_ok=True)
    model, output = root / "model", root / "output"
    write_model(model, model_type, fields)
    records = [
        {"prompt": f"{n} and {n}?", "chosen": f" {2 * n}", "rejected": f" {n}"} for n in range(1, 5)
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    config: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "fp32"},
        "data": {"train": str(root / "pairs.jsonl"), "row_tokens": 128, "max_length": 64},
        "objective": {"beta": 0.3, "layers": [2]},
        "optimizer": {"lr": 1e-2},
        "training": {"output": str(output), "global_batch_pairs": 4, "max_steps": 1},
        "checkpoint": {"every_steps": None},
        "reference": {"source": "resident"},
    }
    config["data"] |= {"num_workers": 1, "cache": str(root / "tokens")}
    (root / "config.yaml").write_text(json.dumps(config))
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        code = megatron_idpo(["train", str(root / "config.yaml")])
    if code:
        lines = [line for line in printed.getvalue().splitlines() if line.strip()]
        return f"exit {code}: " + " ".join(lines[-6:])
    return _compare(model, output / "hf")


def _compare(base: Path, exported: Path) -> str:
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, trust_remote_code=False
            )(tokens).logits
            for path in (base, exported)
        ]
    if not all(one.isfinite().all() for one in logits):
        return "logits are not finite"
    return "equals the base model" if torch.equal(*logits) else "ok"


def _child(root: Path, name: str, connection: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        connection.send(run(root, *MODELS[name]))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


def main() -> int:
    """Print one line per model; returns 1 if fewer than 14 work."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("names", nargs="*", default=list(MODELS))
    arguments = parser.parse_args()
    # Imported once, for all forked processes.
    import transformers

    with suppress_megatron_warnings():
        from megatron_idpo.train import loop

    assert transformers and loop
    results = {}
    for name in arguments.names:
        receiver, sender = get_context("fork").Pipe(duplex=False)
        root = arguments.directory / MODELS[name][0] / name.replace(" ", "-")
        child = get_context("fork").Process(target=_child, args=(root, name, sender))
        child.start()
        sender.close()
        try:
            results[name] = receiver.recv()
        except EOFError:
            results[name] = "the process died"
        child.join()
        print(f"{name:12} {results[name]}", flush=True)
    working = sum(result == "ok" for result in results.values())
    print(f"{working} of {len(results)} work")
    return int(working < min(14, len(results)))


if __name__ == "__main__":
    sys.exit(main())
