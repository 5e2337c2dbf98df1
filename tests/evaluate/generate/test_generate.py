"""The verb `generate`: files of answers, resumption and errors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_idpo.errors import DataError, UserError
from megatron_idpo.evaluate.generate.answers import answers_file, read_answers, settings_file
from megatron_idpo.evaluate.generate.models import inspect_model
from megatron_idpo.evaluate.generate.run import main
from megatron_idpo.evaluate.generate.transformers_engine import TransformersEngine
from megatron_idpo.evaluate.models import EvalModel

from .tiny_answers import (
    CHATML,
    EOS,
    QUESTIONS,
    TURN_END,
    answered,
    no_model_is_loaded,
    user,
    write_config,
    write_model,
    write_records,
    write_tokenizer,
)

Tokens = list[list[int]]


def interrupted(after: int) -> Any:
    """Raises `KeyboardInterrupt` after so many batches."""
    answer: Callable[..., Tokens] = TransformersEngine.answer
    remaining = [after]

    def answer_some(self: TransformersEngine, first: int, prompts: Any) -> Tokens:
        if not remaining[0]:
            raise KeyboardInterrupt
        remaining[0] -= 1
        return answer(self, first, prompts)

    return patch.object(TransformersEngine, "answer", answer_some)


def test_every_model_answers_every_prompt(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = write_model(tmp_path / "other", seed=8, initializer_range=0.2)
    models = {"one": str(model), "two": str(other)}
    assert main(write_config(tmp_path, model, evaluate={"models": models}), []) == 0
    one, two = (read_answers(answers_file(tmp_path / "out", name)) for name in models)
    assert [answer.prompt for answer in one] == [user(text) for text in QUESTIONS]
    assert [answer.index for answer in one] == list(range(5))
    assert [answer.location for answer in one] == [
        f"{tmp_path}/prompts.jsonl:{n}" for n in range(1, 6)
    ]
    assert [answer.prompt for answer in two] == [answer.prompt for answer in one]
    assert [answer.answer for answer in two] != [answer.answer for answer in one]
    assert all(answer.answer_tokens == 12 or answer.is_complete for answer in one)
    assert "5 prompts, transformers on " in caplog.text
    assert "complete, " in caplog.text and caplog.messages[-1].endswith("answers/two.jsonl")
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


def test_an_answer_ends_at_the_stop_token_and_has_no_special_tokens(
    model: Path, tmp_path: Path
) -> None:
    def answer(self: Any, first: int, prompts: Any) -> Tokens:
        tokens = [76, 2, 77]  # two letters with a special token between them
        return [[*tokens, TURN_END, 0, 0], [*tokens, 78, 79, 80]][: len(prompts)]

    with patch.object(TransformersEngine, "answer", answer):
        main(write_config(tmp_path, model), [])
    ended, cut = read_answers(answers_file(tmp_path / "out", "one"))[:2]
    assert (ended.answer_tokens, ended.is_complete) == (3, True)
    assert (cut.answer_tokens, cut.is_complete) == (6, False)
    assert len(ended.answer) == 2 and cut.answer.startswith(ended.answer)


@pytest.mark.parametrize(
    ("config", "generation", "stops"),
    [
        ([EOS, TURN_END], [EOS], [EOS]),
        ([EOS], [EOS, TURN_END], [EOS, TURN_END]),
        (TURN_END, "missing", [TURN_END]),
        (EOS, None, []),
    ],
)
def test_answers_end_only_where_the_files_of_the_model_say(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, config: Any, generation: Any, stops: list[int]
) -> None:
    """The tokenizer's EOS and the template's end of turn would hide a fault of an export."""
    model = write_model(tmp_path / "m", eos_token_id=config)
    path = model / "generation_config.json"
    if generation == "missing":
        path.unlink()
    else:
        path.write_text(json.dumps({"eos_token_id": generation}))
    with patch.object(TransformersEngine, "answer", lambda _, first, batch: [[76, 3, 9]] * 2):
        main(write_config(tmp_path, model), ["generate.max_prompts=2"])
    answers = read_answers(answers_file(tmp_path / "out", "one"))
    settings = json.loads(settings_file(answers_file(tmp_path / "out", "one")).read_text())
    assert settings["answers"]["stop_tokens"] == stops
    assert answers[0].is_complete == (TURN_END in stops)
    warning = "one: '<|im_end|>' (3), which ends answers in the chat template, is not an end token"
    assert (warning in caplog.text) == (TURN_END not in stops)


def test_an_adapter_brings_its_end_tokens(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", eos_token_id=EOS)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    one = EvalModel("one", str(model), adapter)
    assert inspect_model(one, torch.float32, "vllm").end_tokens == (EOS,)
    generation = {"eos_token_id": [EOS, TURN_END]}
    (adapter / "generation_config.json").write_text(json.dumps(generation))
    assert inspect_model(one, torch.float32, "vllm").end_tokens == (EOS, TURN_END)


@pytest.fixture(scope="module")
def uninterrupted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """Path of prompts, and their sampled answers by a run that was not interrupted."""
    root = tmp_path_factory.mktemp("uninterrupted")
    prompts = write_records(root / "p.jsonl", [{"prompt": user(text)} for text in QUESTIONS])
    generate = {"prompts": prompts, "temperature": 1.5}
    assert main(write_config(root, model, generate=generate), []) == 0
    return prompts, answered(root)


@pytest.mark.parametrize(("batches", "torn_line"), [(0, b""), (1, b'{"index": 2, "loc'), (2, b"")])
def test_an_interrupted_file_is_completed_with_the_same_bytes(
    model: Path, tmp_path: Path, uninterrupted: tuple[str, bytes], batches: int, torn_line: bytes
) -> None:
    """In the third case, one line of a batch of two is left."""
    prompts, answers = uninterrupted
    generate = {"prompts": prompts, "temperature": 1.5}
    config = write_config(tmp_path, model, generate=generate)
    with interrupted(after=batches), pytest.raises(KeyboardInterrupt):
        main(config, [])
    path = answers_file(tmp_path / "out", "one")
    settings = settings_file(path).read_bytes()
    if batches == 2:
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    with path.open("ab") as file:
        file.write(torn_line)
    if batches:
        with pytest.raises(DataError, match=r"has not finished|Invalid JSON"):
            read_answers(path)
    assert main(config, []) == 0
    assert answered(tmp_path) == answers
    assert settings_file(path).read_bytes() == settings


def test_a_finished_model_is_not_loaded_again(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = write_config(tmp_path, model)
    main(config, [])
    before = answered(tmp_path)
    shutil.copytree(model, tmp_path / "copy")
    with no_model_is_loaded(), patch("megatron_idpo.evaluate.generate.task.__version__", "99"):
        assert main(config, [f"evaluate.models={{one: {tmp_path}/copy}}"]) == 0
    assert "from an earlier run" in caplog.text
    assert answered(tmp_path) == before


def test_all_differing_settings_are_reported(model: Path, tmp_path: Path) -> None:
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
    with no_model_is_loaded(), pytest.raises(DataError) as caught:
        main(config, changes)
    for message in (
        "model.weights differs",
        "sampling.temperature was 0.3, is now 0.7",
        "prompts.count was 5, is now 3",
        "model.dtype was fp32, is now bf16",
        "sampling.seed was 0, is now 1",
        "name another directory in evaluate.output, or delete",
    ):
        assert message in str(caught.value)
    assert answered(tmp_path) == before
    settings_file(answers_file(tmp_path / "out", "one")).unlink()
    with pytest.raises(DataError, match=r"one\.settings\.json: cannot be read"):
        main(config, [])


def test_an_unfinished_file_requires_the_same_versions(model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, model)
    with interrupted(after=1), pytest.raises(KeyboardInterrupt):
        main(config, [])
    with (
        patch("megatron_idpo.evaluate.generate.task.__version__", "99"),
        pytest.raises(DataError, match=r"made_with\.megatron-idpo was .*, is now 99"),
    ):
        main(config, [])


def test_a_prompt_that_is_too_long_is_refused(model: Path, tmp_path: Path) -> None:
    texts = ["x" * length for length in (10, 300, 20, 200, 230)]
    prompts = write_records(tmp_path / "p.jsonl", [{"prompt": text} for text in texts])
    config = write_config(tmp_path, model, generate={"prompts": prompts, "max_new_tokens": 40})
    with no_model_is_loaded(), pytest.raises(DataError) as caught:
        main(config, [])
    assert [p.location.rpartition(":")[2] for p in caught.value.problems] == ["2", "5"]
    message = "the prompt has 300 tokens; with an answer of 40 it exceeds the context of one, 256"
    assert message in str(caught.value) and "lower generate.max_new_tokens" in str(caught.value)


def test_skipped_rows_are_counted(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = write_records(tmp_path / "p.jsonl", [{"prompt": user("Why?")}, {"question": "x"}])
    data = {"train": "unread.jsonl", "on_bad_row": "skip"}
    main(write_config(tmp_path, model, generate={"prompts": prompts}, data=data), [])
    assert "1 prompt, transformers" in caplog.text and "one: 1 answer, " in caplog.text
    assert "skipped 1 row without a prompt (data.on_bad_row)" in caplog.messages


def test_plain_text_prompts_are_reported(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = write_records(tmp_path / "p.jsonl", [{"prompt": "Why?"}])
    main(write_config(tmp_path, model, generate={"prompts": prompts}), [])
    assert "1 prompt of plain text, used without the chat template; " in caplog.text
    assert read_answers(answers_file(tmp_path / "out", "one"))[0].prompt == "Why?"


# ---- models ------------------------------------------------------------------------------------


def refusal(root: Path, model: Path, entry: Any) -> str:
    with no_model_is_loaded(), pytest.raises(UserError) as caught:
        main(write_config(root, model, evaluate={"models": {"one": entry}}), [])
    return str(caught.value)


def test_a_torch_dist_checkpoint_must_be_converted(model: Path, tmp_path: Path) -> None:
    directory = tmp_path / "ours"
    directory.mkdir()
    (directory / "metadata.json").write_text("{}")
    message = refusal(tmp_path, model, str(directory))
    assert f"{directory} is a torch_dist checkpoint, which cannot generate" in message
    assert f"megatron-idpo convert megatron-to-hf {directory}" in message


def test_incomplete_models_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no hf/: the run has not finished" in refusal(tmp_path, model, f"{tmp_path}/empty")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text('{"model_type": "no-such-thing"}')
    assert "has no weights" in refusal(tmp_path, model, str(bare))
    (bare / "model.safetensors").write_bytes(b"")
    assert "Transformers cannot read" in refusal(tmp_path, model, str(bare))


def test_an_adapter_needs_its_files_and_peft(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "adapter"
    entry = {"path": str(model), "adapter": str(adapter)}
    assert "has no adapter_config.json" in refusal(tmp_path, model, entry)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refusal(tmp_path, model, entry)
    assert "needs the library peft" in message and "pip install peft" in message


def test_a_vocabulary_larger_than_the_models_is_refused(model: Path, tmp_path: Path) -> None:
    small = write_model(tmp_path / "small", vocab_size=64)
    for file in small.glob("token*"):
        file.unlink()
    message = refusal(tmp_path, model, str(small))
    assert "occurs in the prompts, but the vocabulary of one ends at 63" in message


def test_a_model_with_another_vocabulary_uses_its_own_tokenizer(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked: dict[str, Tokens] = {}

    def answer(self: Any, first: int, prompts: Any) -> Tokens:
        asked.setdefault(self._location, []).extend(prompts)
        return [[1] for _ in prompts]

    other = write_model(tmp_path / "other")
    file = other / "tokenizer.json"
    spec = json.loads(file.read_text())
    spec["post_processor"] = None
    spec["normalizer"] = {"type": "Lowercase"}  # another vocabulary
    file.write_text(json.dumps(spec))
    same = write_model(tmp_path / "same", seed=5)
    write_tokenizer(same, template=CHATML.replace("user", "human"))  # the run's template is used
    models = {"one": str(model), "same": str(same), "other": str(other)}
    config = write_config(tmp_path, model, evaluate={"models": models})
    with patch.object(TransformersEngine, "answer", answer):
        main(config, [])
        assert "other uses its own tokenizer and chat template" in caplog.messages
        assert caplog.text.count("own tokenizer") == 1
        of_run, of_same, own = asked.values()
        assert of_run == of_same != own
        shutil.rmtree(tmp_path / "out")
        asked.clear()
        main(config, [f"model.tokenizer={model}"])  # set explicitly, it is used for all models
        assert len({str(prompts) for prompts in asked.values()}) == 1


def test_vllm_receives_many_batches_per_call(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    class Engine:
        def __init__(self, task: Any) -> None:
            assert len(task.prompts) == len(QUESTIONS)

        def answer(self, first: int, prompts: Any) -> Tokens:
            calls.append(len(prompts))
            return [[76, 1] for _ in prompts]

        def close(self) -> None:
            calls.append(0)

    monkeypatch.setattr("megatron_idpo.evaluate.generate.vllm_engine.VllmEngine", Engine)
    monkeypatch.setattr("megatron_idpo.evaluate.generate.run.choose_engine", lambda wanted: "vllm")
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{name} 1")
    assert main(write_config(tmp_path, model), []) == 0
    assert calls == [5, 0]
    settings = json.loads(settings_file(answers_file(tmp_path / "out", "one")).read_text())
    assert settings["answers"]["engine"] == "vllm" and settings["made_with"]["vllm"] == "vllm 1"
