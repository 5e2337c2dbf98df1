"""Layouts whose memory is measured and planned: examples, the phantom benchmark's rows, random."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.plan.devices import DEVICES
from megatron_idpo.plan.memory import StageMemory, stage_memory
from megatron_idpo.plan.models import ModelSizes
from megatron_idpo.plan.run_sizes import Assumptions, RunSizes

HF_CONFIGS = Path(__file__).parents[1] / "mcore" / "hf_configs"

MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}


def hf_model(name: str, **differences: Any) -> dict[str, Any]:
    """A config.json of tests/mcore/hf_configs with fields replaced."""
    config: dict[str, Any] = json.loads((HF_CONFIGS / f"{name}.json").read_text())
    return config | differences


def llama(layers: int, hidden: int, heads: int, keys: int, ffn: int, **more: Any) -> dict[str, Any]:
    """A model of any size, of any family that has Llama's fields."""
    return {
        "model_type": "llama",
        "vocab_size": 32000,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "intermediate_size": ffn,
        **more,
    }


@dataclass(frozen=True)
class LayoutCase:
    """One rank's memory in one layout."""

    name: str
    model: dict[str, Any]
    world_size: int = 1
    stage: int = 0
    rows: int = 2
    """Full rows of one replica."""

    layout: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    layers: tuple[float, ...] = (0.69,)
    training: dict[str, Any] = field(default_factory=dict)
    row_tokens: int = 4096
    dtype: str = "bf16"

    @property
    def config(self) -> dict[str, Any]:
        """The sections of a configuration; a batch that fills the rows."""
        layout = {"sequence_parallel": self.layout.get("tensor", 1) > 1, **self.layout}
        ranks = layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("context", 1)
        pairs = self.rows * (self.world_size // ranks)
        sections: dict[str, Any] = {
            "model": {"path": "x", "dtype": self.dtype},
            "data": {"train": "x", "row_tokens": self.row_tokens, "max_length": self.row_tokens},
            "objective": {"layers": list(self.layers)},
            "layout": layout,
            "optimizer": {"lr": 1e-4},
            "training": {"output": "x", "global_batch_pairs": pairs, **self.training},
        }
        if self.lora is not None:
            sections["lora"] = self.lora
        return sections

    def as_json(self) -> str:
        """For `measured_layouts.py`."""
        rank = self.stage * (self.world_size // self.layout.get("pipeline", 1))
        fields = {"rank": rank, "world_size": self.world_size, "rows": self.rows}
        return json.dumps({"config": self.config, "model": self.model, **fields})

    def planned(self) -> StageMemory:
        """What the plan says."""
        model = ModelSizes.from_hf(self.model, self.name)
        config = RunConfig.model_validate(self.config)
        assumed = Assumptions(pair_tokens=self.row_tokens)
        run = RunSizes.of(config, model, self.world_size, assumed)
        assert run.most_rows == self.rows, f"{self.name}: {run.most_rows}, {self.rows} measured"
        return stage_memory(run, self.stage, DEVICES["h100"])


LORA = {"rank": 16, "alpha": 16, "dropout": 0.05}

SMALL = llama(4, 4096, 32, 8, 14336)

FEW = [
    LayoutCase("adapters, tensor parallel", SMALL, 8, layout={"tensor": 2}, lora=LORA),
    LayoutCase(
        "all weights, second stage, tap", SMALL, 16, 1, 8, {"pipeline": 2}, layers=(0.25, 0.5)
    ),
    LayoutCase(
        "interleaved stages, recomputed",
        llama(8, 2048, 16, 8, 8192),
        16,
        rows=8,
        layout={"pipeline": 2, "virtual_pipeline": 2, "tensor": 2},
        training={"recompute": "full", "recompute_layers": 1},
    ),
    LayoutCase(
        "experts", llama(4, 4096, 32, 8, 14336, **MIXTRAL), 8, layout={"expert": 4}, lora=LORA
    ),
]
"""Measured in `make test`."""


def example_cases() -> list[LayoutCase]:
    """Every stage of the layouts of examples/, as their commands start them."""
    llama_8b, solar = hf_model("llama-3.1-8b"), hf_model("solar-10.7b")
    big = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    llama_70b = hf_model("llama-3.1-8b", num_hidden_layers=80, **big)
    mistral, qwen = hf_model("mistral-7b-instruct-v0.1"), hf_model("qwen2.5-7b")
    interleaved = {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}
    recomputed, plain = {"recompute": "full"}, tuple[float, ...]()
    smollm = hf_model("smollm2-135m")
    quickstart = {"layers": (15,), "lora": LORA, "row_tokens": 384, "dtype": "fp32", "rows": 12}
    cases = [
        LayoutCase("llama3_8b", llama_8b, 8, rows=2, layout={"tensor": 2}, lora=LORA),
        LayoutCase("llama3_8b_full", llama_8b, 8, rows=4, layout={"tensor": 4}),
        LayoutCase("llama3_70b", llama_70b, 32, rows=4, layout={"tensor": 8}, lora=LORA),
        LayoutCase("idpo_mistral_7b", mistral, 8, rows=2, layout={"tensor": 2}, lora=LORA),
    ]
    for name, model, size in (("8b", llama_8b, 8), ("70b", llama_70b, 64)):
        split = {"tensor": size // 8, "context": 8}
        cases.append(
            LayoutCase(
                f"llama3_{name}_128k",
                model,
                size,
                0,
                1,
                split,
                LORA,
                (0.69,),
                recomputed,
                136 << 10,
            )
        )
    for stage in range(4):
        four = {"pipeline": 4}
        cases += [
            LayoutCase(
                f"llama3_70b_full, stage {stage}", llama_70b, 64, stage, 8, {"tensor": 8, **four}
            ),
            LayoutCase(
                f"solar_10_7b, stage {stage}", solar, 8, stage, 4, four, LORA, training=recomputed
            ),
            LayoutCase(
                f"sdpo_solar_10b, {stage}", solar, 8, stage, 4, four, LORA, plain, recomputed
            ),
        ]
    for stage in range(2):
        cases += [
            LayoutCase(
                f"qwen2_5_7b, stage {stage}", qwen, 8, stage, 4, interleaved, LORA, (0.5, 0.75)
            ),
            LayoutCase(
                f"quickstart, stage {stage}", smollm, 2, stage, layout={"pipeline": 2}, **quickstart
            ),
        ]
    return cases


def benchmark_cases() -> list[LayoutCase]:
    """The rows of `benchmarks/phantom_steps.py`."""
    llama_8b = hf_model("llama-3.1-8b")
    big = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    llama_70b = hf_model("llama-3.1-8b", num_hidden_layers=80, **big)
    without = {**LORA, "dropout": 0.0}
    return [
        LayoutCase("8b-lora", llama_8b, rows=4, lora=LORA),
        LayoutCase("8b-lora-no-dropout", llama_8b, rows=4, lora=without),
        LayoutCase(
            "8b-lora-recompute", llama_8b, rows=4, lora=LORA, training={"recompute": "full"}
        ),
        LayoutCase("8b-full-dp64", llama_8b, 64),
        LayoutCase("70b-lora-tp8", llama_70b, 64, rows=4, layout={"tensor": 8}, lora=LORA),
        LayoutCase("70b-full-tp8-pp4", llama_70b, 64, 2, 8, {"tensor": 8, "pipeline": 4}),
        LayoutCase("70b-lora-tp8-pp8", llama_70b, 512, 1, 16, {"tensor": 8, "pipeline": 8}, LORA),
    ]


def random_cases(seed: int, count: int) -> list[LayoutCase]:
    """Models and layouts of many sizes; the same for the same seed."""
    rng = random.Random(seed)
    return [_random_case(rng, f"random {seed}/{index}") for index in range(count)]


def _random_case(rng: random.Random, name: str) -> LayoutCase:
    tensor, stages = rng.choice([1, 1, 2, 4, 8]), rng.choice([1, 1, 2, 4])
    chunks = rng.choice([1, 2]) if stages > 1 else 1
    heads, keys = rng.choice([(16, 8), (32, 8), (40, 8), (64, 8)])
    layers = stages * chunks * rng.randint(2, 4)
    hidden, ffn = 128 * heads, 512 * rng.randint(4, 56)
    kind = rng.choice(["llama", "llama", "qwen2", "qwen3", "mixtral", "qwen3_moe"])
    context = 1 if kind in ("mixtral", "qwen3_moe") else rng.choice([1, 1, 2, 4, 8])
    more: dict[str, Any] = {"model_type": kind, "vocab_size": rng.choice([32000, 128256, 152064])}
    layout: dict[str, Any] = {"tensor": tensor, "pipeline": stages, "virtual_pipeline": chunks}
    layout["context"] = context
    if kind == "mixtral":
        more |= MIXTRAL
        layout["expert"] = rng.choice([1, 2, 4, 8])
    elif kind == "qwen3_moe":
        more |= QWEN3_MOE | {"intermediate_size": ffn}
        layout["expert"] = rng.choice([8, 16, 32])
    elif kind == "qwen3":
        more["head_dim"] = 128
    if kind in ("llama", "qwen2"):
        more["tie_word_embeddings"] = rng.random() < 0.3
    data = layout.get("expert", 1) * rng.choice([1, 2, 4])
    mode = rng.choice(["off", "off", "selective", "full", "some"])
    training: dict[str, Any] = {"recompute": "full" if mode == "some" else mode}
    if mode == "some":
        training["recompute_layers"] = rng.randint(1, layers // (stages * chunks))
    has_expert_adapters = "expert" in layout and rng.random() < 0.5
    targets = rng.choice(["all-linear", ["q_proj", "v_proj"]])
    lora: dict[str, Any] = {"rank": rng.choice([8, 64]), "targets": targets}
    lora["dropout"] = rng.choice([0.0, 0.1])
    if has_expert_adapters:
        lora |= {"dropout": 0.0, "target_parameters": ["mlp.experts.gate_up_proj"]}
    return LayoutCase(
        name,
        llama(layers, hidden, heads, keys, ffn, **more),
        tensor * stages * context * data,
        rng.randrange(stages),
        stages * rng.randint(1, 4),
        layout,
        lora if rng.random() < 0.5 else None,
        tuple(sorted(rng.sample(range(1, layers), min(layers - 1, rng.choice([0, 1, 2]))))),
        training,
        rng.choice([1024, 2048, 4096, 8192]) * context,
    )
