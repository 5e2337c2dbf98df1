"""The papers that a configuration's method is from, as BibTeX, for the model card."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from megatron_idpo.config.run_config import RunConfig


class Paper(NamedTuple):
    """A paper on arXiv; the year is that of its number."""

    key: str
    authors: str
    """The first one, or all, as BibTeX writes them."""

    title: str
    number: str

    def bibtex(self) -> str:
        """The entry for a bibliography."""
        return (
            f"@misc{{{self.key},\n"
            f"  title={{{{{self.title}}}}},\n"
            f"  author={{{self.authors}}}, year={{20{self.number[:2]}}},\n"
            f"  eprint={{{self.number}}}, archivePrefix={{arXiv}}}}"
        )


DPO = Paper(
    "rafailov2023direct",
    "Rafailov, Rafael and others",
    "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    "2305.18290",
)
INTERMEDIATE = Paper(
    "kojima2024intermediate",
    "Kojima, Atsushi",
    "Intermediate Direct Preference Optimization",
    "2408.02923",
)
SDPO = Paper(
    "kim2024sdpo", "Kim, Dahyun and others", "sDPO: Don't Use Your Data All at Once", "2403.19270"
)
LORA = Paper(
    "hu2021lora",
    "Hu, Edward J. and others",
    "LoRA: Low-Rank Adaptation of Large Language Models",
    "2106.09685",
)
F_DPO = Paper(
    "wang2023beyond",
    "Wang, Chaoqi and others",
    "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence "
    "Constraints",
    "2309.16240",
)
WPO = Paper(
    "zhou2024wpo",
    "Zhou, Wenxuan and others",
    "WPO: Enhancing RLHF with Weighted Preference Optimization",
    "2406.11827",
)
MPO = Paper(
    "wang2024mpo",
    "Wang, Weiyun and others",
    "Enhancing the Reasoning Ability of Multimodal Large Language Models via Mixed Preference "
    "Optimization",
    "2411.10442",
)
RPO = Paper(
    "pang2024iterative",
    "Pang, Richard Yuanzhe and others",
    "Iterative Reasoning Preference Optimization",
    "2404.19733",
)
_APO = Paper(
    "doosterlinck2024anchored",
    "D'Oosterlinck, Karel and others",
    "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in "
    "Alignment",
    "2408.06266",
)
_AOT = Paper(
    "melnyk2024distributional",
    "Melnyk, Igor and others",
    "Distributional Preference Alignment of LLMs via Optimal Transport",
    "2406.05882",
)

LOSSES: Mapping[str, Paper] = MappingProxyType(
    {
        "hinge": Paper(
            "liu2023statistical",
            "Liu, Tianqi and others",
            "Statistical Rejection Sampling Improves Preference Optimization",
            "2309.06657",
        ),
        "ipo": Paper(
            "azar2023general",
            "Azar, Mohammad Gheshlaghi and others",
            "A General Theoretical Paradigm to Understand Learning from Human Preferences",
            "2310.12036",
        ),
        "robust": Paper(
            "chowdhury2024provably",
            "Ray Chowdhury, Sayak and others",
            "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
            "2403.00409",
        ),
        "exo_pair": Paper(
            "ji2024efficient",
            "Ji, Haozhe and others",
            "Towards Efficient Exact Optimization of Language Model Alignment",
            "2402.00856",
        ),
        "nca_pair": Paper(
            "chen2024noise",
            "Chen, Huayu and others",
            "Noise Contrastive Alignment of Language Models with Explicit Rewards",
            "2402.05369",
        ),
        "bco_pair": Paper(
            "jung2024binary",
            "Jung, Seungjae and others",
            "Binary Classifier Optimization for Large Language Model Alignment",
            "2404.04656",
        ),
        "sppo_hard": Paper(
            "wu2024self",
            "Wu, Yue and others",
            "Self-Play Preference Optimization for Language Model Alignment",
            "2405.00675",
        ),
        "aot": _AOT,
        "aot_unpaired": _AOT,
        "apo_zero": _APO,
        "apo_down": _APO,
        "discopop": Paper(
            "lu2024discovering",
            "Lu, Chris and others",
            "Discovering Preference Optimization Algorithms with and for Large Language Models",
            "2406.08414",
        ),
    }
)
"""By loss; the others are variants of DPO, and `sft` is none of a paper on preferences."""


def citations(config: RunConfig, steps: Sequence[RunConfig]) -> list[str]:
    """BibTeX entries, each once.

    Args:
        config: of the run.
        steps: of sDPO, or the run itself.
    """
    return [paper.bibtex() for paper in dict.fromkeys(_papers(config, steps))]


def _papers(config: RunConfig, steps: Sequence[RunConfig]) -> Iterator[Paper]:
    objective = config.objective
    yield DPO
    if any(step.objective.layers for step in steps):
        yield INTERMEDIATE
    if config.sdpo is not None:
        yield SDPO
    yield from (LOSSES[loss] for loss in objective.losses if loss in LOSSES)
    used = {
        MPO: len(objective.losses) > 1,
        F_DPO: objective.f_divergence != "reverse_kl",
        WPO: objective.wpo,
        RPO: objective.nll_weight > 0,
        LORA: config.lora is not None,
    }
    yield from (paper for paper, is_used in used.items() if is_used)
