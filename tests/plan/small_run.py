"""A run that is small enough to calculate by hand."""

from typing import Any

from megatron_idpo.config.layout import Layout
from megatron_idpo.config.lora import LoraConfig
from megatron_idpo.plan.models import ModelSizes
from megatron_idpo.plan.run_sizes import Assumptions, RunLength, RunSizes

_MODEL: dict[str, Any] = {
    "family": "llama",
    "num_layers": 4,
    "num_heads": 2,
    "num_kv_heads": 1,
    "ffn_hidden_size": 16,
    "vocab_size": 10,
    "hidden_size": 8,
    "head_dim": 4,
}


def small_run(
    layout: dict[str, Any] | None = None,
    *,
    world_size: int = 1,
    dtype: str = "bf16",
    lora: bool = False,
    taps: tuple[int, ...] = (),
    rows: int = 2,
    row_tokens: int = 64,
    **model: Any,
) -> RunSizes:
    """Full rows of one pair each; `model` replaces fields of `ModelSizes`."""
    chosen = Layout.model_validate(layout or {})
    return RunSizes(
        model=ModelSizes(**(_MODEL | model)),
        layout=chosen,
        world_size=world_size,
        dtype=dtype,
        lora=LoraConfig(rank=2) if lora else None,
        taps=taps,
        recompute="off",
        recompute_layers=None,
        row_tokens=row_tokens,
        trim_tokens=0,
        longest_pair_tokens=row_tokens,
        global_batch_pairs=rows * chosen.data(world_size),
        lengths=(RunLength(1.0, 1, None),),
        reference="cache",
        shards_optimizer=True,
        assumed=Assumptions(pair_tokens=row_tokens),
    )
