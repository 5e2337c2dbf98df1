"""Published figures of the two papers, shown next to measured ones.

Copied by hand; `tests/evaluate/test_paper_figures.py` checks that they are consistent.
"""

from dataclasses import dataclass

SDPO_PAPER = "Kim et al. 2024 (sDPO, arXiv 2403.19270v2), Tables 2 and 3"
INTERMEDIATE_PAPER = "Kojima 2024 (intermediate DPO, arXiv 2408.02923)"


@dataclass(frozen=True, slots=True)
class PaperH4:
    """One row of the sDPO paper's table, in percent."""

    model: str
    mean: float
    """H4 as printed."""

    values: tuple[float, float, float, float]
    """ARC, HellaSwag, MMLU, TruthfulQA: the order of `config_evaluate.H4_TASKS`."""


PAPER_H4 = (
    PaperH4("SOLAR SFT + sDPO", 74.31, (71.33, 88.08, 65.39, 72.45)),
    PaperH4("SOLAR SFT + DPO (both sets)", 72.67, (69.62, 87.16, 66.00, 67.90)),
    PaperH4("SOLAR SFT + sDPO (random split)", 72.56, (69.20, 87.27, 65.96, 67.81)),
    PaperH4("SOLAR SFT", 69.51, (67.32, 85.96, 65.95, 58.80)),
    PaperH4("SOLAR 10.7B", 64.27, (61.95, 84.60, 65.48, 45.04)),
    PaperH4("Mistral-7B-Instruct-v0.2", 69.27, (63.14, 84.88, 60.78, 68.26)),
)
"""SFT, DPO and sDPO start from SOLAR 10.7B. All items of each task; without intervals."""


@dataclass(frozen=True, slots=True)
class PaperWins:
    """How often a judge preferred the answers of intermediate DPO to those of another model."""

    other: str
    """The other model: `dpo` or `sft`."""

    wins: int
    """Computed from the printed share; the paper gives no counts and no rule for ties."""

    prompts: int


PAPER_WINS = (PaperWins("dpo", 21, 40), PaperWins("sft", 27, 40))
"""Run id5, tapped at layer 22 of 32; the paper prints 52.5 % and 67.5 %."""

PAPER_DEPTH = 0.69
"""Relative depth of layer 22 of 32, for models with another number of layers."""
