"""Local judges, compared with scores computed directly with Transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from megatron_idpo.errors import CheckpointError, ConfigError, DataError
from megatron_idpo.evaluate.judge.run import main

from .judge_case import comparison_directory, result, verdicts, won_and_lost, write_case

PAIR = "idpo-vs-base"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SEED = 1
"""Seed of weights with which the language model prefers both sides, and shows position bias."""

CLOSE = 1e-4
"""Tolerance of float32 scores that another call computes from the same tokens."""

ANSWERS = {
    "base": ["red", "a blue one", "green", "no", "perhaps not", "7", "same", "x y z"],
    "idpo": ["pink", "black", "a white one", "yes", "maybe", "eight", "same", "abc"],
}
ROWS = range(len(ANSWERS["base"]))


def write_tokenizer(directory: Path, chat_template: str | None = TEMPLATE) -> None:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = chat_template
    fast.save_pretrained(directory)


def write_judge(
    directory: Path, kind: type, *, template: str | None = TEMPLATE, **sizes: Any
) -> str:
    """A tiny random model with large weights, so that its scores differ clearly."""
    config = LlamaConfig(
        **{
            "vocab_size": 256,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": 0.6,
            "num_labels": 1,
            "pad_token_id": None,
            **sizes,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        kind(config).save_pretrained(directory)
    write_tokenizer(directory, template)
    return str(directory)


def zero_head(directory: str, kind: Any, name: str) -> None:
    """Makes all scores equal."""
    model = kind.from_pretrained(directory)
    getattr(model, name).weight.data.zero_()
    model.save_pretrained(directory)


def counts(values: Mapping[str, Any]) -> tuple[int, int, int, int]:
    return values["wins"], values["losses"], values["ties"], values["unjudged"]


# ---- reward models ---------------------------------------------------------------------------


def scores(directory: str, name: str) -> list[float]:
    """Rewards computed directly with Transformers."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    values = []
    for index in ROWS:
        turns = [
            {"role": "user", "content": f"Question {index}?"},
            {"role": "assistant", "content": ANSWERS[name][index]},
        ]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            values.append(model(input_ids=ids["input_ids"]).logits.item())
    return values


def test_the_higher_reward_wins(tmp_path: Path) -> None:
    model = write_judge(tmp_path / "rm", LlamaForSequenceClassification)
    case = write_case(tmp_path, ANSWERS, kind="reward", model=model)
    assert main(case, []) == 0
    expected = list(zip(scores(model, "idpo"), scores(model, "base"), strict=True))
    wins = sum(a > b for a, b in expected)
    ties = sum(a == b for a, b in expected)
    assert 0 < wins < 7 and ties == 1, "otherwise this tests nothing"
    assert counts(result(tmp_path, PAIR)) == (wins, 8 - wins - ties, ties, 0)
    for line in verdicts(tmp_path, PAIR):
        assert line["order"] == "both"
        if "scores" in line:
            assert [*line["scores"].values()] == pytest.approx(expected[line["index"]], abs=CLOSE)
    settings = json.loads((comparison_directory(tmp_path, PAIR) / "settings.json").read_text())
    assert (
        settings["kind"] == "reward" and "template" not in settings and "base_url" not in settings
    )


def test_equal_rewards_are_ties(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_judge(tmp_path / "rm", LlamaForSequenceClassification)
    zero_head(model, AutoModelForSequenceClassification, "score")
    assert main(write_case(tmp_path, ANSWERS, kind="reward", model=model), []) == 0
    values = result(tmp_path, PAIR)
    assert counts(values) == (0, 0, 8, 0) and values["identical"] == 1
    assert "50.0 %" in values["summary"] and "no evidence" in capsys.readouterr().out


def test_a_second_run_loads_no_model_and_other_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_judge(tmp_path / "rm", LlamaForSequenceClassification)
    case = write_case(tmp_path, ANSWERS, kind="reward", model=model)
    assert main(case, []) == 0
    monkeypatch.setattr("megatron_idpo.evaluate.judge.local.load_hf_model", None)
    assert main(case, []) == 0
    zero_head(model, AutoModelForSequenceClassification, "score")
    with pytest.raises(ConfigError, match=r"idpo-vs-base: weights differs"):
        main(case, [])


def test_a_text_longer_than_the_context_is_unjudged(tmp_path: Path) -> None:
    sizes = {"max_position_embeddings": 64}
    model = write_judge(tmp_path / "rm", LlamaForSequenceClassification, **sizes)
    answers = {"base": ["red", "blue"], "idpo": ["pink" * 20, "grey"]}
    with pytest.raises(DataError, match="1 of 2 prompts have no verdict"):
        main(write_case(tmp_path, answers, kind="reward", model=model), [])
    (line,) = (line for line in verdicts(tmp_path, PAIR) if line["verdict"] is None)
    assert line["index"] == 0 and line["note"].endswith("tokens, but the judge reads 64")


def test_models_that_are_not_reward_models_are_refused(tmp_path: Path) -> None:
    causal = write_judge(tmp_path / "lm", LlamaForCausalLM)
    case = write_case(tmp_path, ANSWERS, kind="reward", model=causal)
    with pytest.raises(
        CheckpointError, match=r"judge\.model: .* lacks 1 weight, first score\.weight"
    ):
        main(case, [])
    several = write_judge(tmp_path / "sc", LlamaForSequenceClassification, num_labels=2)
    with pytest.raises(ConfigError, match=r"judge\.model: .* has 2 outputs"):
        main(case, [f"judge.model={several}"])
    plain = write_judge(tmp_path / "plain", LlamaForSequenceClassification, template=None)
    with pytest.raises(ConfigError, match=r"judge\.model: .*plain has no chat template"):
        main(case, [f"judge.model={plain}"])
    with pytest.raises((CheckpointError, DataError), match="nowhere"):
        main(case, [f"judge.model={tmp_path}/nowhere"])


# ---- language models -------------------------------------------------------------------------


SHORT = """{% block system %}Which?{% endblock %}
{% block user %}{{ answer_a }} or {{ answer_b }}{% endblock %}"""
"""So short that the output of a tiny model depends on the answers."""


def preferences(directory: str) -> list[tuple[str, str]]:
    """The letters that the model prefers, `idpo` shown first and second."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    values = []
    for index in ROWS:
        a, b = (ANSWERS[name][index] for name in ("idpo", "base"))
        letters = []
        for first, second in ((a, b), (b, a)):
            turns = [{"role": "user", "content": f"Which?\n\n{first} or {second}"}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(f"{text}Verdict: ", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, -1]
            by_letter = {letter: logits[tokenizer.encode(letter)[0]].item() for letter in "AB"}
            letters.append(max(by_letter, key=lambda letter: by_letter[letter]))
        values.append((letters[0], letters[1]))
    return values


def test_the_letter_that_is_likelier_in_both_orders_wins(tmp_path: Path) -> None:
    model = write_judge(tmp_path / "lm", LlamaForCausalLM)
    path = tmp_path / "short.jinja"
    path.write_text(SHORT)
    case = write_case(tmp_path, ANSWERS, kind="language_model", model=model, template=str(path))
    assert main(case, []) == 0
    expected = preferences(model)
    asked = [pair for index, pair in enumerate(expected) if index != 6]  # identical answers
    wins, losses = asked.count(("A", "B")), asked.count(("B", "A"))
    values = result(tmp_path, PAIR)
    assert counts(values) == (wins, losses, 8 - wins - losses, 0)
    assert values["disagreed"] == 7 - wins - losses
    for line in verdicts(tmp_path, PAIR):
        if line["order"] != "both":
            letter = expected[line["index"]][("ab", "ba").index(line["order"])]
            assert line["verdict"] == ("a" if (letter == "A") == (line["order"] == "ab") else "b")
            assert max(line["scores"].values()) <= 0, "log-probabilities"
    assert wins and losses and values["disagreed"], "otherwise this tests little"


def test_a_model_without_preferences_ties(tmp_path: Path) -> None:
    model = write_judge(tmp_path / "lm", LlamaForCausalLM)
    zero_head(model, AutoModelForCausalLM, "lm_head")
    assert main(write_case(tmp_path, ANSWERS, kind="language_model", model=model), []) == 0
    values = result(tmp_path, PAIR)
    assert counts(values) == (0, 0, 8, 0) and values["disagreed"] == 0
    (line, *_) = (line for line in verdicts(tmp_path, PAIR) if line["order"] == "ab")
    # All 256 tokens are equally likely: ln(1/256).
    assert line["scores"] == pytest.approx({"A": -5.545177, "B": -5.545177})


def test_a_model_without_a_chat_template_reads_plain_text(tmp_path: Path) -> None:
    model = write_judge(tmp_path / "lm", LlamaForCausalLM, template=None)
    case = write_case(tmp_path, won_and_lost(1, 1), kind="language_model", model=model)
    assert main(case, []) == 0
    assert result(tmp_path, PAIR)["unjudged"] == 0
