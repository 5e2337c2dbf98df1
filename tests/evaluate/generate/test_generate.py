"""`generate` from a configuration to files of answers: whole, interrupted, refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_idpo.errors import ConfigError, DataError, UserError
from megatron_idpo.evaluate.generate.answers import answers_file, read_answers, settings_file
from megatron_idpo.evaluate.generate.run import main
from megatron_idpo.evaluate.generate.transformers_engine import TransformersEngine

from .tiny_answers import (
    CHATML,
    QUESTIONS,
    TURN_END,
    answered,
    unread,
    user,
    write_config,
    write_model,
    write_records,
    write_tokenizer,
)

Tokens = list[list[int]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return write_model(tmp_path_factory.mktemp("model") / "m", initializer_range=0.2)


def interrupted(after: int) -> Any:
    """Ctrl-C when so many batches are answered."""
    answer: Callable[..., Tokens] = TransformersEngine.answer
    left = [after]

    def answer_some(self: TransformersEngine, first: int, prompts: Any) -> Tokens:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return answer(self, first, prompts)

    return patch.object(TransformersEngine, "answer", answer_some)


def test_every_model_answers_every_prompt(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_model(tmp_path / "other", seed=8, initializer_range=0.2)
    subjects = {"one": str(model), "two": str(other)}
    assert main(write_config(tmp_path, model, evaluate={"models": subjects}), []) == 0
    one, two = (read_answers(answers_file(tmp_path / "out", name)) for name in subjects)
    assert [answer.prompt for answer in one] == [user(text) for text in QUESTIONS]
    assert [answer.index for answer in one] == list(range(5))
    assert [answer.location for answer in one] == [
        f"{tmp_path}/prompts.jsonl:{n}" for n in range(1, 6)
    ]
    assert [answer.prompt for answer in two] == [answer.prompt for answer in one]
    assert [answer.answer for answer in two] != [answer.answer for answer in one]
    assert all(answer.answer_tokens == 12 or answer.is_complete for answer in one)
    printed = capsys.readouterr().out
    assert "5 prompts, answered by transformers on " in printed
    assert "complete, " in printed and printed.strip().endswith("answers/two.jsonl")
    settings = json.loads(settings_file(answers_file(tmp_path / "out", "one")).read_text())
    assert settings["sampling"] == {
        "temperature": 0.3,
        "repetition_penalty": 1.1,
        "top_p": 1.0,
        "max_new_tokens": 12,
        "seed": 0,
        "batch_prompts": 2,
    }
    assert settings["answers"]["stop_tokens"] == [1, TURN_END]


def test_an_answer_ends_with_its_turn_and_has_no_control_tokens(
    model: Path, tmp_path: Path
) -> None:
    def answer(self: Any, first: int, prompts: Any) -> Tokens:
        said = [76, 2, 77]  # two letters, a control token between them
        return [[*said, TURN_END, 0, 0], [*said, 78, 79, 80]][: len(prompts)]

    with patch.object(TransformersEngine, "answer", answer):
        main(write_config(tmp_path, model), [])
    ended, cut = read_answers(answers_file(tmp_path / "out", "one"))[:2]
    assert (ended.answer_tokens, ended.is_complete) == (3, True)
    assert (cut.answer_tokens, cut.is_complete) == (6, False)
    assert len(ended.answer) == 2 and cut.answer.startswith(ended.answer)


@pytest.mark.parametrize(("batches", "rest"), [(0, b""), (1, b'{"index": 2, "pla'), (2, b"")])
def test_an_interrupted_file_goes_on_to_the_same_bytes(
    model: Path, tmp_path: Path, batches: int, rest: bytes
) -> None:
    """The third case also has half a batch: a whole line of the last batch but one."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for root in (whole, broken):
        root.mkdir()
    records = [{"prompt": user(text)} for text in QUESTIONS]
    prompts = write_records(tmp_path / "p.jsonl", records)
    configs = [
        write_config(root, model, generate={"prompts": prompts, "temperature": 1.5})
        for root in (whole, broken)
    ]
    assert main(configs[0], []) == 0
    with interrupted(after=batches), pytest.raises(KeyboardInterrupt):
        main(configs[1], [])
    path = answers_file(broken / "out", "one")
    assert answered(whole).startswith(path.read_bytes() if batches else b"")
    if batches == 2:
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:3]))
    with path.open("ab") as file:
        file.write(rest)
    if batches:
        with pytest.raises(DataError, match=r"has not finished|is not JSON"):
            read_answers(path)
    assert main(configs[1], []) == 0
    assert answered(broken) == answered(whole)
    assert (
        settings_file(path).read_bytes()
        == settings_file(answers_file(whole / "out", "one")).read_bytes()
    )


def test_a_finished_model_is_not_loaded_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, model)
    main(config, [])
    before = answered(tmp_path)
    shutil.copytree(model, tmp_path / "copy")
    with unread(), patch("megatron_idpo.evaluate.generate.task.__version__", "99"):
        assert main(config, [f"evaluate.models={{one: {tmp_path}/copy}}"]) == 0
    assert "were there already" in capsys.readouterr().out
    assert answered(tmp_path) == before


def test_answers_of_another_kind_are_refused_part_by_part(model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, model)
    main(config, [])
    before = answered(tmp_path)
    other = write_model(tmp_path / "other", seed=8)
    changes = [
        f"evaluate.models={{one: {other}}}",
        "generate.temperature=0.7",
        "generate.max_prompts=3",
        "model.dtype=bf16",
        "evaluate.seed=1",
    ]
    with unread(), pytest.raises(DataError) as caught:
        main(config, changes)
    for message in (
        "the model differs",
        "generate.temperature is 0.3 there, 0.7 here",
        "the number of prompts is 5 there, 3 here",
        "model.dtype is fp32 there, bf16 here",
        "evaluate.seed is 0 there, 1 here",
        "name another directory in evaluate.output, or delete",
    ):
        assert message in str(caught.value)
    assert answered(tmp_path) == before
    settings_file(answers_file(tmp_path / "out", "one")).unlink()
    with pytest.raises(DataError, match="nothing tells what made these answers"):
        main(config, [])


def test_an_unfinished_file_wants_the_same_versions(model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, model)
    with interrupted(after=1), pytest.raises(KeyboardInterrupt):
        main(config, [])
    with (
        patch("megatron_idpo.evaluate.generate.task.__version__", "99"),
        pytest.raises(DataError, match=r"the version of megatron-idpo is .* there, 99 here"),
    ):
        main(config, [])


def test_a_prompt_without_room_for_its_answer_is_refused(model: Path, tmp_path: Path) -> None:
    texts = ["x" * length for length in (10, 300, 20, 200, 230)]
    prompts = write_records(tmp_path / "p.jsonl", [{"prompt": text} for text in texts])
    config = write_config(tmp_path, model, generate={"prompts": prompts, "max_new_tokens": 40})
    with unread(), pytest.raises(DataError) as caught:
        main(config, [])
    assert [p.location.rpartition(":")[2] for p in caught.value.problems] == ["2", "5"]
    message = "the prompt has 300 tokens, and one has room for 216 before an answer of 40"
    assert message in str(caught.value) and "lower generate.max_new_tokens by 84" in str(
        caught.value
    )
    with pytest.raises(ConfigError, match="is 256, but one has 256 positions in all"):
        main(config, ["generate.max_new_tokens=256"])


def test_skipped_rows_are_counted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_records(tmp_path / "p.jsonl", [{"prompt": user("Why?")}, {"question": "x"}])
    data = {"train": "unread.jsonl", "on_bad_row": "skip"}
    main(write_config(tmp_path, model, generate={"prompts": prompts}, data=data), [])
    printed = capsys.readouterr().out
    assert "1 prompt, answered" in printed and "1 row without a prompt was skipped" in printed
    assert "one: 1 answer, " in printed


def test_text_is_said_not_to_be_asked_as_a_chat(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_records(tmp_path / "p.jsonl", [{"prompt": "Why?"}])
    main(write_config(tmp_path, model, generate={"prompts": prompts}), [])
    assert "1 prompt is text and is continued as it is; to ask it " in capsys.readouterr().out
    assert read_answers(answers_file(tmp_path / "out", "one"))[0].prompt == "Why?"


# ---- models ------------------------------------------------------------------------------------


def refused(root: Path, model: Path, subject: Any) -> str:
    with unread(), pytest.raises(UserError) as caught:
        main(write_config(root, model, evaluate={"models": {"one": subject}}), [])
    return str(caught.value)


def test_a_checkpoint_of_ours_has_to_be_converted(model: Path, tmp_path: Path) -> None:
    directory = tmp_path / "ours"
    directory.mkdir()
    (directory / "metadata.json").write_text("{}")
    message = refused(tmp_path, model, str(directory))
    assert f"{directory} is a torch_dist checkpoint, which cannot generate" in message
    assert f"megatron-idpo convert megatron-to-hf {directory}" in message


def test_what_is_no_model_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(tmp_path, model, f"{tmp_path}/empty")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text('{"model_type": "no-such-thing"}')
    assert "has no weights" in refused(tmp_path, model, str(bare))
    (bare / "model.safetensors").write_bytes(b"")
    assert "Transformers cannot read" in refused(tmp_path, model, str(bare))


def test_an_adapter_needs_its_files_and_peft(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "adapter"
    subject = {"path": str(model), "adapter": str(adapter)}
    assert "has no adapter_config.json" in refused(tmp_path, model, subject)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refused(tmp_path, model, subject)
    assert "needs the library peft" in message and "pip install peft" in message


def test_a_tokenizer_that_is_not_the_models_is_refused(model: Path, tmp_path: Path) -> None:
    small = write_model(tmp_path / "small", vocab_size=64)
    for file in small.glob("token*"):
        file.unlink()
    message = refused(tmp_path, model, str(small))
    assert "occurs in the prompts, but the vocabulary of one ends at 63" in message


def test_a_model_of_another_vocabulary_is_asked_in_its_own_tokens(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Tokens] = {}

    def answer(self: Any, first: int, prompts: Any) -> Tokens:
        asked.setdefault(self._place, []).extend(prompts)
        return [[1] for _ in prompts]

    other = write_model(tmp_path / "other")
    file = other / "tokenizer.json"
    spec = json.loads(file.read_text())
    spec["post_processor"] = None
    spec["normalizer"] = {"type": "Lowercase"}  # another vocabulary, as far as texts go
    file.write_text(json.dumps(spec))
    same = write_model(tmp_path / "same", seed=5)
    write_tokenizer(same, template=CHATML.replace("user", "human"))  # the run's template counts
    subjects = {"one": str(model), "same": str(same), "other": str(other)}
    config = write_config(tmp_path, model, evaluate={"models": subjects})
    with patch.object(TransformersEngine, "answer", answer):
        main(config, [])
        printed = capsys.readouterr().out.splitlines()
        [message] = [line for line in printed if "own tokenizer" in line]
        assert message == "other is asked through its own tokenizer and chat template"
        assert printed.index(message) < min(
            n for n, line in enumerate(printed) if "answers," in line
        )
        mine, alike, own = asked.values()
        assert mine == alike != own
        shutil.rmtree(tmp_path / "out")
        asked.clear()
        main(config, [f"model.tokenizer={model}"])  # said outright, it is everyone's
        assert len({str(prompts) for prompts in asked.values()}) == 1


def test_vllm_gets_many_batches_at_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    class Engine:
        def __init__(self, *arguments: Any, longest_prompt_tokens: int) -> None:
            assert longest_prompt_tokens > max(map(len, QUESTIONS))

        def answer(self, first: int, prompts: Any) -> Tokens:
            calls.append(len(prompts))
            return [[76, 1] for _ in prompts]

        def close(self) -> None:
            calls.append(0)

    monkeypatch.setattr("megatron_idpo.evaluate.generate.vllm_engine.VllmEngine", Engine)
    monkeypatch.setattr("megatron_idpo.evaluate.generate.run.choose_engine", lambda wanted: "vllm")
    assert main(write_config(tmp_path, model), []) == 0
    assert calls == [5, 0]
    settings = json.loads(settings_file(answers_file(tmp_path / "out", "one")).read_text())
    assert settings["answers"]["engine"] == "vllm" and settings["made_with"]["vllm"] == "unknown"
