"""The Transformers engine: padding, batches and the model's defaults have no influence."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, RepetitionPenaltyLogitsProcessor

from megatron_idpo.config.evaluate import GenerateConfig
from megatron_idpo.errors import CheckpointError
from megatron_idpo.evaluate.generate.models import InspectedModel
from megatron_idpo.evaluate.generate.transformers_engine import (
    PaddingAwareScores,
    TransformersEngine,
)

from .tiny_answers import EOS, engine_task, write_model

GREEDY = GenerateConfig(temperature=0.0, repetition_penalty=1.3, max_new_tokens=16)
DRAWN = GenerateConfig(temperature=1.5, repetition_penalty=1.0, max_new_tokens=16)
SUPPRESSED = frozenset(range(100, 150))
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16], [17, 18]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a generation config that differs in every parameter."""
    path = write_model(tmp_path_factory.mktemp("model"), initializer_range=0.3)
    file = path / "generation_config.json"
    defaults = {"top_k": 1, "do_sample": True, "max_length": 3, "eos_token_id": 7}
    file.write_text(json.dumps({**defaults, "suppress_tokens": sorted(SUPPRESSED)}))
    return path


def engine(
    directory: Path,
    sampling: GenerateConfig,
    *,
    seed: int = 0,
    adapter: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> TransformersEngine:
    model = InspectedModel("m", directory, adapter, dtype, 256, 264, frozenset())
    return TransformersEngine(engine_task(model, sampling, stop_tokens=[EOS], seed=seed))


def until_eos(answers: list[list[int]]) -> list[list[int]]:
    """Answers up to and including EOS; padding may follow it."""
    return [a[: a.index(EOS) + 1] if EOS in a else a for a in answers]


def plain_greedy(directory: Path, prompt: list[int], sampling: GenerateConfig) -> list[int]:
    """A plain loop: the whole sequence again for each token, without cache and padding."""
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


def test_greedy_answers_equal_a_plain_loop_in_any_batch(directory: Path) -> None:
    expected = [plain_greedy(directory, prompt, GREEDY) for prompt in PROMPTS]
    model = engine(directory, GREEDY)
    alone = [model.answer(at, [prompt])[0] for at, prompt in enumerate(PROMPTS)]
    together = model.answer(0, PROMPTS)
    assert until_eos(alone) == expected
    assert until_eos(together) == expected
    assert len({tuple(answer) for answer in expected}) == 4


def test_padding_is_not_penalized() -> None:
    """The second row is padded with EOS, which its prompt does not contain."""
    tokens = torch.tensor([[4, 5, 6], [EOS, EOS, 6]])
    is_token = torch.tensor([[1, 1, 1], [0, 0, 1]])
    scores = torch.linspace(-1, 1, 16).repeat(2, 1)
    found = PaddingAwareScores(is_token, 2.0, "m")(tokens, scores.clone())
    assert found[1, EOS] == scores[1, EOS]
    alone = RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([[6]]), scores[1:].clone())
    assert torch.equal(found[1:], alone)
    whole = RepetitionPenaltyLogitsProcessor(2.0)(tokens[:1], scores[:1].clone())
    assert torch.equal(found[:1], whole)


def test_generated_tokens_are_penalized() -> None:
    scores = torch.ones(1, 16)
    found = PaddingAwareScores(torch.tensor([[0, 1]]), 2.0, "m")(
        torch.tensor([[EOS, 4, 9]]), scores
    )
    assert found[0].tolist() == [0.5 if token in (4, 9) else 1.0 for token in range(16)]


def test_samples_depend_only_on_seed_and_batch(directory: Path) -> None:
    model = engine(directory, DRAWN)
    state = torch.get_rng_state()
    first = model.answer(0, PROMPTS)
    torch.manual_seed(99)
    assert model.answer(0, PROMPTS) == first  # independent of the process's random state
    assert model.answer(4, PROMPTS) != first
    assert engine(directory, DRAWN, seed=1).answer(0, PROMPTS) != first
    torch.set_rng_state(state)
    model.answer(0, PROMPTS)
    assert torch.equal(torch.get_rng_state(), state)  # which is not changed


def test_the_models_generation_config_is_ignored(directory: Path) -> None:
    """It sets a top_k of 1, another EOS, suppressed tokens, and a length of 3."""
    sampling = DRAWN.model_copy(
        update={"temperature": 50.0}
    )  # all 264 tokens are nearly equally likely
    longest = engine(directory, sampling).answer(0, [[5, 6]] * 8)
    assert max(map(len, longest)) == 16
    many = engine(directory, sampling.model_copy(update={"max_new_tokens": 1})).answer(
        0, [[5, 6]] * 600
    )
    drawn = {token for answer in many for token in answer}
    assert len(drawn) > 200  # Transformers' default top_k is 50
    assert drawn & SUPPRESSED


def test_a_tiny_top_p_is_greedy(directory: Path) -> None:
    narrow = engine(directory, DRAWN.model_copy(update={"top_p": 1e-6})).answer(0, PROMPTS)
    greedy = engine(directory, GREEDY.model_copy(update={"repetition_penalty": 1.0})).answer(
        0, PROMPTS
    )
    assert narrow == greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_have_the_configured_dtype(directory: Path, dtype: torch.dtype) -> None:
    model = engine(directory, GREEDY, dtype=dtype)
    assert {parameter.dtype for parameter in model._model.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.0, torch.inf, 0.0], "output is infinite"),
        ([torch.nan, torch.inf, 0.0], "output is NaN"),
        ([-torch.inf] * 3, "output is infinite"),
    ],
)
def test_nan_and_infinite_scores_are_errors(scores: list[float], message: str) -> None:
    fine = [0.0, -torch.inf, 1.0]  # one token is excluded
    check = PaddingAwareScores(torch.tensor([[1], [1]]), 1.0, "m")
    check(torch.tensor([[4], [5]]), torch.tensor([fine, fine]))
    with pytest.raises(CheckpointError) as caught:
        check(torch.tensor([[4], [5]]), torch.tensor([fine, scores]))
    assert message in str(caught.value)


def test_a_nan_weight_is_an_error(directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = write_model(tmp_path / "nan")
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"output is NaN; set model\.dtype"):
        engine(path, DRAWN).answer(0, PROMPTS)


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = write_model(tmp_path / "m")
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lacks 1 weight, first model\.layers\.1\.mlp\.up_proj"
    ):
        engine(path, GREEDY)


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m")
    (path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"m/model\.safetensors: is truncated, damaged"):
        engine(path, GREEDY)


def write_adapter(directory: Path, target: Path) -> Path:
    """Writes a random LoRA adapter, and the merged model in `target`.merged."""
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


def test_an_adapter_equals_the_merged_model(directory: Path, tmp_path: Path) -> None:
    adapter = write_adapter(directory, tmp_path / "adapter")
    found = engine(directory, GREEDY, adapter=adapter).answer(0, PROMPTS)
    assert found == engine(tmp_path / "adapter.merged", GREEDY).answer(0, PROMPTS)
    assert found != engine(directory, GREEDY).answer(0, PROMPTS)
    half = engine(directory, GREEDY, adapter=adapter, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half._model.parameters()} == {torch.bfloat16}


def test_an_adapter_of_another_model_is_refused(directory: Path, tmp_path: Path) -> None:
    adapter = write_adapter(directory, tmp_path / "adapter")
    deep, flat = (write_model(tmp_path / str(n), num_hidden_layers=n) for n in (3, 1))
    missing = r"adapter: cannot be loaded: (.|\n)*missing adapter keys(.|\n)*layers\.2\."
    with pytest.raises(CheckpointError, match=missing):
        engine(deep, GREEDY, adapter=adapter)
    unexpected = r"adapter: has 4 tensors for other layers, first .*layers\.1\..*lora_A"
    with pytest.raises(CheckpointError, match=unexpected):
        engine(flat, GREEDY, adapter=adapter)
    wide = write_model(tmp_path / "wide", hidden_size=64)
    with pytest.raises(CheckpointError, match=r"adapter: cannot be loaded(.|\n)*was trained on$"):
        engine(wide, GREEDY, adapter=adapter)


def test_an_adapter_with_shared_tensors_is_accepted(directory: Path, tmp_path: Path) -> None:
    """PEFT saves the vector bank of VB-LoRA once, and loads it into every layer."""
    from peft import VBLoRAConfig, get_peft_model

    options = {"r": 2, "num_vectors": 8, "vector_length": 8, "target_modules": ["q_proj"]}
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    get_peft_model(base, VBLoRAConfig(**options)).save_pretrained(tmp_path)
    engine(directory, GREEDY, adapter=tmp_path)
