"""`CASES`: the model families that `test_families.py` compares with Transformers.

An entry gives every check. The sizes are those of `megatron_idpo.testing.tiny_models`, where each
family has a small value of every setting that it alone has.
"""

from dataclasses import dataclass, field
from typing import Any

from megatron_idpo.config.layout import Layout

TIED = {"tie_word_embeddings": True}


@dataclass(frozen=True)
class FamilyCase:
    """One tiny model."""

    family: str
    """A key of `FAMILIES`."""

    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of its config.json."""

    frozen_head: bool = False
    """Whether training compares with a frozen head, whose gradient takes another way."""

    @property
    def config(self) -> dict[str, Any]:
        """What `write_tiny_hf_model` takes."""
        sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        return {**sizes, **heads, **self.overrides}


LONGROPE = {
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]},
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 64,
}

YARN = {
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
}
"""Its factor on queries and keys is 1.14, in layers with rotary embedding only."""

CASES: dict[str, FamilyCase] = {
    "llama": FamilyCase("llama"),
    "mistral": FamilyCase("mistral", {"sliding_window": 5}),
    "qwen2": FamilyCase("qwen2", TIED),
    "qwen3": FamilyCase("qwen3"),
    "smollm3": FamilyCase("smollm3", TIED),
    "smollm3-windows": FamilyCase("smollm3", {"use_sliding_window": True, "sliding_window": 4}),
    "smollm3-yarn": FamilyCase("smollm3", TIED | YARN),
    "seed_oss": FamilyCase("seed_oss"),
    "granite": FamilyCase("granite", TIED, frozen_head=True),
    "granite-untied": FamilyCase("granite"),
    "ministral3": FamilyCase("ministral3"),
    "phi3": FamilyCase("phi3", {"sliding_window": 5}),
    "phi4-mini": FamilyCase("phi3", TIED | LONGROPE),
    "olmo2": FamilyCase("olmo2"),
    "olmo3": FamilyCase("olmo3"),
    "glm": FamilyCase("glm"),
    "glm4": FamilyCase("glm4"),
    "ernie4_5": FamilyCase("ernie4_5", TIED),
    "gemma": FamilyCase("gemma", TIED),
    "gemma2": FamilyCase("gemma2", TIED, frozen_head=True),
    "gemma2-untied": FamilyCase("gemma2"),
    "gemma3": FamilyCase("gemma3_text", TIED),
    "gemma3-capped": FamilyCase("gemma3_text", TIED | {"final_logit_softcapping": 4.0}),
}

IN_MAKE_TEST = "smollm3-yarn seed_oss granite ministral3 phi4-mini olmo2 glm4 gemma2 gemma3".split()
"""With one process. The older families and the variants are in `make test-all`."""

COMBINED = "olmo3"
"""The family that `make test` runs on four processes: a norm that the ranks share, two sets of
rotary frequencies, norms in the residual sum, windows."""

LAYOUTS = {
    "TP1": Layout(),
    "TP2": Layout(tensor=2),
    "TP2-SP": Layout(tensor=2, sequence_parallel=True),
    "PP2": Layout(pipeline=2),
    "TP2-PP2": Layout(tensor=2, pipeline=2),
    "TP2-PP2-SP": Layout(tensor=2, pipeline=2, sequence_parallel=True),
    "CP2": Layout(context=2),
}
