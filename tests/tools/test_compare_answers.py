"""`tools/compare_answers.py` on tiny models: greedy answers, truncation mark, layout, errors."""

import io
from pathlib import Path

import compare_answers
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from megatron_idpo.testing import write_tiny_hf_model

TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
CUT = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random byte-level model, whose answers never end."""
    directory = write_tiny_hf_model(tmp_path_factory.mktemp("model"), "llama")
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: n for n, symbol in enumerate(symbols)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE)
    tokenizer.save_pretrained(directory)
    return directory


def greedy_tokens(directory: Path, text: str) -> list[int]:
    """The `CUT` most likely next tokens, one after the other."""
    net = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt = AutoTokenizer.from_pretrained(directory).encode(text)
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(CUT):
            tokens.append(int(net(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_answer_is_greedy_and_marked_where_it_is_truncated(model: Path) -> None:
    tokens = greedy_tokens(model, "<Why?>")
    text = AutoTokenizer.from_pretrained(model).decode(tokens)
    assert compare_answers.answer(str(model), "Why?", CUT) == f"{text.strip()} [...]"


def test_complete_answer_is_not_marked(model: Path, tmp_path: Path) -> None:
    """The same model, with the third generated token as its end token."""
    tokens = greedy_tokens(model, "<Why?>")
    assert tokens[2] not in tokens[:2]
    tokenizer, net = (kind.from_pretrained(model) for kind in (AutoTokenizer, AutoModelForCausalLM))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokens[2])
    net.generation_config.eos_token_id = tokens[2]
    tokenizer.save_pretrained(tmp_path)
    net.save_pretrained(tmp_path)
    assert (
        compare_answers.answer(str(tmp_path), "Why?", CUT) == tokenizer.decode(tokens[:2]).strip()
    )


def test_answers_are_printed_side_by_side_without_truncation() -> None:
    text = io.StringIO()
    long, markup = "word " * 40, "[bold]not markup[/bold]"
    console = Console(file=text, width=60)
    compare_answers.show(console, "Why?", {"runs/one": long.strip(), "runs/two": markup})
    lines = text.getvalue().splitlines()
    assert lines[0] == "Question: Why?"
    heading = next(line for line in lines if "runs/one" in line)
    assert "runs/two" in heading
    assert text.getvalue().count("word") == 40
    assert markup in text.getvalue()
    assert max(map(len, lines)) <= 60


def test_directory_without_a_model_is_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare_answers.main([str(tmp_path), str(tmp_path), "Why?"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"compare_answers: {tmp_path}: cannot be loaded: ")
    assert captured.err.count("\n") == 1
