"""Transformers as an engine: padding, batches and the model's own defaults have no influence."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, RepetitionPenaltyLogitsProcessor

from megatron_idpo.errors import CheckpointError
from megatron_idpo.evaluate.generate.engine import Sampling, Weights
from megatron_idpo.evaluate.generate.transformers_engine import PaddedScores, TransformersEngine

from .tiny_answers import EOS, write_model

GREEDY = Sampling(temperature=0.0, repetition_penalty=1.3, top_p=1.0, max_new_tokens=16, seed=0)
DRAWN = replace(GREEDY, temperature=1.5, repetition_penalty=1.0)
SUPPRESSED = frozenset(range(100, 150))
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16], [17, 18]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose own generation config wants everything otherwise."""
    path = write_model(tmp_path_factory.mktemp("model"), initializer_range=0.3)
    file = path / "generation_config.json"
    unwanted = {"top_k": 1, "do_sample": True, "max_length": 3, "eos_token_id": 7}
    file.write_text(json.dumps({**unwanted, "suppress_tokens": sorted(SUPPRESSED)}))
    return path


def engine(directory: Path, sampling: Sampling, **weights: Any) -> TransformersEngine:
    chosen = {"adapter": None, "dtype": "fp32", **weights}
    return TransformersEngine(Weights(directory, **chosen), sampling, [EOS])


def ended(answers: list[list[int]]) -> list[list[int]]:
    """Up to the token that ends an answer; behind it is padding."""
    return [a[: a.index(EOS) + 1] if EOS in a else a for a in answers]


def plain_greedy(directory: Path, prompt: list[int], sampling: Sampling) -> list[int]:
    """Written out: the whole sequence again for each token, without cache and padding."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = list(prompt)
    while len(tokens) < len(prompt) + sampling.max_new_tokens:
        with torch.no_grad():
            scores = model(torch.tensor([tokens])).logits[0, -1]
        for token in set(tokens):
            factor = sampling.repetition_penalty
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        tokens.append(int(scores.argmax()))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


def test_greedy_answers_are_those_of_a_plain_loop_in_any_batch(directory: Path) -> None:
    wanted = [plain_greedy(directory, prompt, GREEDY) for prompt in PROMPTS]
    model = engine(directory, GREEDY)
    alone = [model.answer(at, [prompt])[0] for at, prompt in enumerate(PROMPTS)]
    together = model.answer(0, PROMPTS)
    assert ended(alone) == wanted
    assert ended(together) == wanted
    assert len({tuple(answer) for answer in wanted}) == 4


def test_padding_is_not_penalised() -> None:
    """Of two rows the second is padded with EOS, which it never had."""
    tokens = torch.tensor([[4, 5, 6], [EOS, EOS, 6]])
    is_token = torch.tensor([[1, 1, 1], [0, 0, 1]])
    scores = torch.linspace(-1, 1, 16).repeat(2, 1)
    found = PaddedScores(is_token, 2.0, "m")(tokens, scores.clone())
    assert found[1, EOS] == scores[1, EOS]
    alone = RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([[6]]), scores[1:].clone())
    assert torch.equal(found[1:], alone)
    whole = RepetitionPenaltyLogitsProcessor(2.0)(tokens[:1], scores[:1].clone())
    assert torch.equal(found[:1], whole)


def test_tokens_that_were_just_made_are_penalised() -> None:
    scores = torch.ones(1, 16)
    found = PaddedScores(torch.tensor([[0, 1]]), 2.0, "m")(torch.tensor([[EOS, 4, 9]]), scores)
    assert found[0].tolist() == [0.5 if token in (4, 9) else 1.0 for token in range(16)]


def test_draws_depend_on_the_seed_and_the_batch_alone(directory: Path) -> None:
    model = engine(directory, DRAWN)
    state = torch.get_rng_state()
    first = model.answer(0, PROMPTS)
    torch.manual_seed(99)
    assert model.answer(0, PROMPTS) == first  # whatever was drawn before
    assert model.answer(4, PROMPTS) != first
    assert engine(directory, replace(DRAWN, seed=1)).answer(0, PROMPTS) != first
    torch.set_rng_state(state)
    model.answer(0, PROMPTS)
    assert torch.equal(torch.get_rng_state(), state)  # the process's own draws go on


def test_the_models_own_defaults_have_no_say(directory: Path) -> None:
    """Its generation config wants few tokens, another end, 3 tokens in all."""
    sampling = replace(DRAWN, temperature=50.0)  # all 264 tokens are nearly as likely
    longest = engine(directory, sampling).answer(0, [[5, 6]] * 8)
    assert max(map(len, longest)) == 16
    many = engine(directory, replace(sampling, max_new_tokens=1)).answer(0, [[5, 6]] * 600)
    drawn = {token for answer in many for token in answer}
    assert len(drawn) > 200  # Transformers' own default leaves 50
    assert drawn & SUPPRESSED


def test_top_p_leaves_the_likeliest(directory: Path) -> None:
    narrow = engine(directory, replace(DRAWN, top_p=1e-6)).answer(0, PROMPTS)
    greedy = engine(directory, replace(GREEDY, repetition_penalty=1.0)).answer(0, PROMPTS)
    assert narrow == greedy


@pytest.mark.parametrize(("dtype", "held"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_are_held_as_wanted(directory: Path, dtype: str, held: torch.dtype) -> None:
    model = engine(directory, GREEDY, dtype=dtype)
    assert {parameter.dtype for parameter in model._model.parameters()} == {held}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.0, torch.inf, 0.0], "no number (infinite)"),
        ([torch.nan, torch.inf, 0.0], "no number (NaN)"),
        ([-torch.inf] * 3, "no number (infinite)"),
    ],
)
def test_scores_that_nothing_can_be_drawn_from_are_an_error(
    scores: list[float], message: str
) -> None:
    fine = [0.0, -torch.inf, 1.0]  # one token is ruled out
    check = PaddedScores(torch.tensor([[1], [1]]), 1.0, "m")
    check(torch.tensor([[4], [5]]), torch.tensor([fine, fine]))
    with pytest.raises(CheckpointError) as caught:
        check(torch.tensor([[4], [5]]), torch.tensor([fine, scores]))
    assert message in str(caught.value)


def test_output_that_is_no_number_is_an_error(directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = write_model(tmp_path / "nan")
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no number \(NaN\); set model\.dtype"):
        engine(path, DRAWN).answer(0, PROMPTS)


def test_a_model_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = write_model(tmp_path / "m")
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weight, model\.layers\.1\.mlp\.up_proj"):
        engine(path, GREEDY)


def test_a_file_that_is_damaged_is_reported(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m")
    (path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"m: cannot be loaded"):
        engine(path, GREEDY)


def write_adapter(directory: Path, target: Path) -> Path:
    """A LoRA that changes something; and, in `target`.merged, the model with it merged."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(4)
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(target)
    merged = model.merge_and_unload()
    merged.save_pretrained(target.with_suffix(".merged"))
    return target


def test_an_adapter_answers_as_the_merged_model(directory: Path, tmp_path: Path) -> None:
    adapter = write_adapter(directory, tmp_path / "adapter")
    found = engine(directory, GREEDY, adapter=adapter).answer(0, PROMPTS)
    assert found == engine(tmp_path / "adapter.merged", GREEDY).answer(0, PROMPTS)
    assert found != engine(directory, GREEDY).answer(0, PROMPTS)
    half = engine(directory, GREEDY, adapter=adapter, dtype="bf16")
    assert {parameter.dtype for parameter in half._model.parameters()} == {torch.bfloat16}


def test_an_adapter_of_another_depth_is_refused(
    directory: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    adapter = write_adapter(directory, tmp_path / "adapter")
    deep, flat = (write_model(tmp_path / str(n), num_hidden_layers=n) for n in (3, 1))
    layer = r"base_model\.model\.model\.layers\.{}\.[a-z_.]+\.lora_A\.weight, .*lora_B.*, \.\.\.;"
    lacks = r"adapter: lacks 4 tensors: " + layer.format(2)
    with pytest.raises(CheckpointError, match=lacks):
        engine(deep, GREEDY, adapter=adapter)
    spare = r"adapter: has 4 tensors too many: " + layer.format(1)
    with pytest.raises(CheckpointError, match=spare):
        engine(flat, GREEDY, adapter=adapter)
    wide = write_model(tmp_path / "wide", hidden_size=64)
    with pytest.raises(CheckpointError, match=r"adapter: cannot be loaded(.|\n)*was trained on$"):
        engine(wide, GREEDY, adapter=adapter)
    assert not any("missing adapter keys" in str(warning.message) for warning in recwarn)


def test_an_adapter_whose_tensors_are_saved_apart_is_no_other_models(
    directory: Path, tmp_path: Path
) -> None:
    """PEFT saves VB-LoRA's one bank of vectors once and holds it in every layer."""
    from peft import VBLoRAConfig, get_peft_model

    options = {"r": 2, "num_vectors": 8, "vector_length": 8, "target_modules": ["q_proj"]}
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    get_peft_model(base, VBLoRAConfig(**options)).save_pretrained(tmp_path)
    engine(directory, GREEDY, adapter=tmp_path)
