"""Print `docs/support_matrix.md`: which settings of a run can be combined.

    python tools/support_matrix.py > docs/support_matrix.md

Each pair of settings is given to the checks that a run makes before it loads weights: those of the
configuration and `check_against_model`. `tests/tools/test_support_matrix.py` compares the page.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.section import describe_errors
from megatron_idpo.convert.hf_to_megatron import read_architecture
from megatron_idpo.errors import ConfigError, Problem
from megatron_idpo.testing import tiny_hf_config
from megatron_idpo.train.setup import check_against_model

WORLD = 32
"""Processes: a multiple of every layout below and of every pair of them."""

SIZES = {"num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}

BASE: Mapping[str, Any] = {
    "model": {"path": "model", "dtype": "bf16"},
    "data": {"train": "pairs.jsonl", "row_tokens": 4096, "max_length": 64, "trim_tokens": 64},
    "objective": {"layers": [3]},
    "optimizer": {"lr": 1e-5},
    "training": {"output": "run"},
}

_LORA: Mapping[str, Any] = {"lora": {"rank": 8}, "head": {"trained": False}}
"""The head is trained with all weights, and frozen with adapters: no field says so."""

FEATURES: Mapping[str, Mapping[str, Any]] = {
    "`layout.tensor`": {"layout": {"tensor": 2}},
    "with `sequence_parallel`": {"layout": {"tensor": 2, "sequence_parallel": True}},
    "`layout.pipeline`": {"layout": {"pipeline": 4}},
    "with `virtual_pipeline`": {"layout": {"pipeline": 4, "virtual_pipeline": 2}},
    "`layout.context`": {"layout": {"context": 2}},
    "mixture of experts": {"experts": True},
    "with `layout.expert`": {"experts": True, "layout": {"expert": 2}},
    "sliding windows": {"windows": True},
    "all weights, head trained": {"head": {"trained": True}},
    "`lora`, head frozen": _LORA,
    "`lora.dropout`": {**_LORA, "lora": {"rank": 8, "dropout": 0.1}},
    "rows with shared prompts": {"data": {"share_prompt": True}},
    "packed rows, `share_prompt: false`": {"data": {"share_prompt": False}},
    "`recompute: selective`": {"training": {"recompute": "selective"}},
    "`recompute: full`": {"training": {"recompute": "full"}},
    "`reference.source: adapter_off`": {**_LORA, "reference": {"source": "adapter_off"}},
    "`reference.source: resident`": {"reference": {"source": "resident"}},
    "`reference.source: none`": {"reference": {"source": "none"}},
    "`objective.norm: none`": {"objective": {"norm": "none"}},
    "`sdpo`": {"sdpo": {"steps": [{}, {}]}},
    "`objective.wpo`": {"objective": {"wpo": True}},
    "`loss: aot`": {"objective": {"loss": "aot"}},
    "`model.dtype: fp32`": {"model": {"dtype": "fp32"}},
    "`model.dtype: fp16`": {"model": {"dtype": "fp16"}},
}


INTRODUCTION = """\
# Support matrix

Which settings can be combined: ✓ is accepted, – is refused at start with a reason below, and an
empty cell is two values of one field. Written by `python tools/support_matrix.py` from the checks
that a run makes before it loads weights; a test compares it. [evidence.md](evidence.md) says what
is tested, with tolerances.

"""

NOTES = """
Not in the table:

- `loss: aot`, `aot_unpaired`: every global batch must fit one row, so a run with data parallelism
  is refused ([losses.md](losses.md)).
- Rows of a run are always packed. The plugin also takes padded and packed batches of other scripts;
  what it refuses there is in [how_it_works.md](how_it_works.md#what-is-refused).
- Transformer Engine's layers are used where it is installed and the model's norms and activation
  allow it, with LoRA in fp32 only ([lora.md](lora.md#details), [versions.md](versions.md)). FP8,
  FP4, CUDA graphs, FSDP and multi-token prediction are refused.
- Model families and what each was tested with: [families.md](families.md).
"""


def page() -> str:
    """The page as Markdown."""
    names = list(FEATURES)
    lines = [
        "| | " + " | ".join(str(number) for number in range(1, len(names) + 1)) + " |",
        "|---|" + ":-:|" * len(names),
    ]
    reasons: dict[str, None] = {}
    for row, name in enumerate(names):
        cells = []
        for column, other in enumerate(names):
            if column > row or _exclude_each_other(name, other):
                cells.append(" ")
                continue
            problems = refusals(name, other)
            reasons |= dict.fromkeys(problems)
            cells.append("–" if problems else "✓")
        lines.append(f"| {row + 1} {name} | {' | '.join(cells)} |")
    lines += ["", "Refused:", "", *(f"- {reason}" for reason in reasons)]
    return INTRODUCTION + "\n".join(lines) + "\n" + NOTES


def refusals(*names: str) -> list[str]:
    """Why a run with these settings is refused, as `location message`; empty if it is not."""
    sections: dict[str, dict[str, Any]] = {name: dict(fields) for name, fields in BASE.items()}
    family, sizes = "llama", dict(SIZES)
    for name in names:
        for section, fields in FEATURES[name].items():
            if section == "experts":
                family = "mixtral"
            elif section == "windows":
                sizes |= {"sliding_window": 16}
            elif section != "head":
                sections.setdefault(section, {}).update(fields)
    if family == "llama" and "sliding_window" in sizes:
        family = "mistral"
    try:
        config = RunConfig.model_validate(sections)
        architecture = read_architecture(tiny_hf_config(family, **sizes), Path("model"))
        check_against_model(config, architecture, WORLD)
    except ValidationError as error:
        return _texts(describe_errors(error, RunConfig, ()))
    except ConfigError as error:
        return _texts(error.problems)
    return []


def _exclude_each_other(name: str, other: str) -> bool:
    """Whether two settings are values of one field."""
    return any(
        field in FEATURES[other].get(section, {}) and FEATURES[other][section][field] != value
        for section, fields in FEATURES[name].items()
        if isinstance(fields, dict)
        for field, value in fields.items()
    )


def _texts(problems: Sequence[Problem]) -> list[str]:
    return [f"`{problem.location}` {problem.message}" for problem in problems]


if __name__ == "__main__":
    sys.stdout.write(page())
