"""Every model family equals Transformers, from its files to a trained model and an adapter.

`table.py` lists the families. For each of them: logits and gradients; packed rows against each
sequence alone; three training steps with taps against `tests/oracle.py`; Hugging Face to Megatron
and back, byte by byte; an adapter of PEFT, resaved and merged.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_idpo.config.lora import LoraConfig
from megatron_idpo.convert.families import FUSED_MODULES
from megatron_idpo.data.pairs import Pair
from megatron_idpo.errors import CheckpointError, ConfigError
from megatron_idpo.lora.fused_modules import check_blocks, incomplete_modules, same_but_stacked
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.model.families import FAMILIES, MISSING
from megatron_idpo.testing import tiny_hf_config, write_tiny_hf_model
from tests import oracle

from ..convert.test_parity import (
    NUM_SEQUENCES,
    _assert_same_logits_and_gradients,
    _tokens,
    _transformers_results,
)
from ..convert.test_parity import Case as ParityCase
from ..convert.test_roundtrip import assert_same_tensors, tensors
from ..data.packing.packed_answers import Run, single_answer
from ..plugin import tiny_megatron as tiny
from .family_run import EPS, LORA, LR, STEPS, TAPS, family_results
from .table import CASES, COMBINED, IN_MAKE_TEST, LAYOUTS, FamilyCase

LOGP_ABSOLUTE = 1e-4
GRADIENT_RELATIVE = 1e-5
"""|difference| / |gradient| per tensor (Frobenius): fp32 sums in another order."""

LOSS_ABSOLUTE = 2e-5
WEIGHT_IN_LR = 5e-3
"""Weights after three Adam steps with eps 1e-4, in units of the learning rate."""

MERGED_ABSOLUTE = 1e-4
"""Logits: the merged weight is rounded once; unmerged adapters round elsewhere."""

ROW_TOKENS = 48
LENGTHS_P3 = np.array([(20, 9, 7), (1, 4, 6), (12, 1, 15), (3, 2, 2)])
"""Longer than the tiny models' windows, within prompts and across answers."""

LAYERS = (*TAPS, tiny.NUM_LAYERS)

PARAMETERS = [
    pytest.param(
        name,
        layout,
        id=f"{name}-{layout}",
        marks=[]
        if (layout == "TP1" and name in IN_MAKE_TEST)
        or (layout == "TP2-PP2-SP" and name == COMBINED)
        else [pytest.mark.exhaustive],
    )
    for name in CASES
    for layout in LAYOUTS
]


def pairs_of(vocab_size: int) -> list[Pair]:
    random = np.random.default_rng(5)
    return [
        Pair(index, *(random.integers(0, vocab_size, n, dtype=np.int32) for n in lengths))
        for index, lengths in enumerate(LENGTHS_P3)
    ]


def hf_model(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", pad_token_id=None
    ).eval()


class Expected:
    """One tiny model, and what Transformers, PEFT and the oracle compute with it."""

    def __init__(self, case: FamilyCase, root: Path) -> None:
        self.case = case
        self.directory = write_tiny_hf_model(root / "model", case.family, seed=3, **case.config)
        other = write_tiny_hf_model(root / "reference", case.family, seed=4, **case.config)
        model, reference = hf_model(self.directory), hf_model(other)
        self.run = Run(self.directory, pairs_of(model.config.vocab_size), ROW_TOKENS)
        self.parity = _transformers_results(self.directory)
        self.rows = single_answer(self.directory, self.run.pairs)
        with torch.no_grad():
            self.references = oracle.sequence_logps(reference, tiny.pairs(), LAYERS)
        self.training = oracle.train_steps(
            model,
            reference,
            [tiny.pairs()],
            TAPS,
            beta=0.3,
            intermediate_weight=0.4,
            optimizer="adam",
            lr=LR,
            eps=EPS,
            steps=STEPS,
            frozen_head=case.frozen_head,
        )
        self.adapter = root / "adapter"
        self.adapted_logits, self.adapted_parity = self._adapt(model)

    def tokens(self) -> torch.Tensor:
        return torch.arange(30).view(2, 15)

    def _adapt(self, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Save an adapter with random A and B; the adapted model's logits, twice.

        Of `tokens()`, and of the tokens that the parity test uses.
        """
        from peft import LoraConfig, get_peft_model

        fused = FUSED_MODULES.get(self.case.family, {})
        plain = set(LORA.projections) - {name for names in fused.values() for name in names}
        config = LoraConfig(
            r=LORA.rank,
            lora_alpha=int(LORA.alpha),
            target_modules=sorted({*plain, *fused}),
            task_type="CAUSAL_LM",
            init_lora_weights=False,
        )
        adapted = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            adapted.save_pretrained(self.adapter)
            parity = _tokens(model.config.vocab_size)[:, :-1]
            return adapted(self.tokens()).logits, adapted(parity).logits


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices are too small for several threads to help
    known: dict[str, Expected] = {}

    def compute(name: str) -> Expected:
        if name not in known:
            known[name] = Expected(CASES[name], tmp_path_factory.mktemp(name))
        return known[name]

    yield compute
    torch.set_num_threads(threads)


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "layout_name"), PARAMETERS)
def test_family_equals_transformers(name, layout_name, workers, expected, tmp_path):
    truth, layout = expected(name), LAYOUTS[layout_name]
    by_rank = workers.run(
        family_results,
        layout.model_ranks,
        str(truth.directory),
        layout,
        truth.run,
        truth.references,
        truth.case.frozen_head,
        str(truth.adapter),
        str(tmp_path),
        timeout_s=120,
    )
    check_training(truth, [rank["training"] for rank in by_rank])
    if layout.context > 1:
        return
    parity = [rank["parity"] for rank in by_rank]
    _assert_same_logits_and_gradients(ParityCase(layout, layout.model_ranks), parity, truth.parity)
    check_rows(truth, [rank["rows"][0] for rank in by_rank])
    assert_same_tensors(tmp_path / "back", tensors(truth.directory))
    check_adapter(truth, tmp_path)
    shards = {key: value for rank in by_rank for key, value in rank["adapter"].items()}
    for number in range(NUM_SEQUENCES):
        parts = [shards[number * 100 + rank] for rank in range(layout.tensor)]
        logits = torch.cat(parts, dim=-1)[0, :, : truth.adapted_parity.shape[-1]]
        assert (logits - truth.adapted_parity[number]).abs().max() <= MERGED_ABSOLUTE


def check_rows(truth: Expected, by_rank: list[Any]) -> None:
    """Packed shared-prompt rows equal each sequence alone."""
    logps = {pair: value for rank in by_rank for pair, value in rank.logps.items()}
    assert logps.keys() == truth.rows.logps.keys()
    for pair, logps_2 in truth.rows.logps.items():
        assert (logps[pair] - logps_2).abs().max() <= LOGP_ABSOLUTE, f"pair {pair}"
    gradients = {key: value for rank in by_rank for key, value in rank.gradients.items()}
    check_gradients(gradients, truth.rows.gradients)


def check_gradients(gradients: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, gradient in expected.items():
        relative = ((gradients[name] - gradient).norm() / gradient.norm()).item()
        assert relative <= GRADIENT_RELATIVE, f"{name}: {relative:.2e}"


def check_training(truth: Expected, by_rank: list[dict[str, Any]]) -> None:
    """Three steps equal the oracle's."""
    for step, losses in enumerate(truth.training["losses"]):
        for layer, loss in losses.by_layer.items():
            own = [rank["losses"][step][layer] for rank in by_rank if layer in rank["losses"][step]]
            assert own and all((one - loss).abs() <= LOSS_ABSOLUTE for one in own), (step, layer)
    check_gradients(tiny.merged([r["gradients"] for r in by_rank]), truth.training["gradients"])
    weights = tiny.merged([rank["weights"] for rank in by_rank])
    assert weights.keys() == truth.training["weights"].keys()
    for name, weight in truth.training["weights"].items():
        assert (weights[name] - weight).abs().max() <= WEIGHT_IN_LR * LR, name


def check_adapter(truth: Expected, scratch: Path) -> None:
    """PEFT reads the resaved adapter; it is the merged model, and does not change any more."""
    from peft import PeftModel

    first, second = (
        load_file(scratch / name / "adapter_model.safetensors") for name in ("first", "second")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    resaved = PeftModel.from_pretrained(hf_model(truth.directory), scratch / "first")
    with torch.no_grad():
        for model in (resaved, hf_model(scratch / "merged")):
            difference = (model(truth.tokens()).logits - truth.adapted_logits).abs().max()
            assert difference <= MERGED_ABSOLUTE
    base = hf_model(truth.directory)(truth.tokens()).logits
    assert (base - truth.adapted_logits).abs().max() > 100 * MERGED_ABSOLUTE


def test_every_dense_family_is_in_the_table() -> None:
    dense = {name for name in FAMILIES if "moe" not in name and name != "mixtral"}
    assert {case.family for case in CASES.values()} == dense
    assert not FAMILIES.keys() & MISSING.keys()


def table_of(heading: str) -> dict[str, list[str]]:
    """The rows of the first table below a heading of docs/families.md, by model type."""
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    section = text.partition(f"# {heading}\n")[2].partition("\n## ")[0]
    rows = [
        line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")
    ]
    return {name.strip("`"): cells for name, *cells in rows if name != "`model_type`"}


def test_the_documented_families_are_the_supported_and_the_refused_ones() -> None:
    supported = table_of("Model families")
    assert supported.keys() == FAMILIES.keys()
    tested = {case.family for case in CASES.values()}
    for family, (*_, checks) in supported.items():
        assert checks == ("all" if family in tested else "experts"), family
    assert {name: reason for name, (reason,) in table_of("Refused").items()} == MISSING


@pytest.mark.parametrize("family", MISSING)
def test_a_refused_family_is_named_with_what_is_missing(family: str) -> None:
    with pytest.raises(ConfigError) as error:
        Architecture.from_hf({"model_type": family})
    assert MISSING[family] in str(error.value) and "supported are llama" in str(error.value)


def test_part_of_a_fused_module_cannot_have_an_adapter() -> None:
    phi = Architecture.from_hf(tiny_hf_config("phi3"))
    (problem,) = incomplete_modules(LoraConfig(targets=("q_proj", "v_proj", "o_proj")), phi)
    assert "q_proj, v_proj alone, but qkv_proj" in problem.message
    assert not incomplete_modules(LoraConfig(targets=("o_proj", "gate_proj", "up_proj")), phi)


def test_a_stack_of_another_rank_is_refused() -> None:
    """Three times the rank, but not of three adapters: the blocks outside are not zero."""
    file, own = LoraConfig(rank=12, alpha=36.0), LoraConfig(rank=4, alpha=12.0)
    assert same_but_stacked(file, own, ["qkv_proj", "o_proj"]).rank == 4
    for other in (["q_proj", "o_proj"], ["gate_up_proj"], "all-linear", None):
        assert same_but_stacked(file, own, other) == file
    with pytest.raises(CheckpointError, match="not a stack of such adapters"):
        check_blocks("adapter", torch.ones(8, 12), slice(4, 8))
