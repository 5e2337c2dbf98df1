"""The verb `h4` on a tiny model, compared with `simple_evaluate` on hand-written tasks."""

import json
import socket
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from megatron_idpo.errors import CheckpointError, ConfigError, DataError
from megatron_idpo.evaluate.lm_eval import run as h4_run
from megatron_idpo.evaluate.lm_eval import tasks as h4_tasks
from megatron_idpo.evaluate.lm_eval.items import read_items
from megatron_idpo.evaluate.lm_eval.tasks import H4, SAME_FILE, task_specs
from tests.evaluate.generate.tiny_answers import write_model

from .example_items import MMLU, arc, hellaswag, mmlu, write, write_items

pytest.importorskip("lm_eval", reason="lm-eval is not installed: the extra `eval`")

LIMIT = 2
POSITIONS = 2500
"""Tokens, which are bytes: 25 examples of ARC."""

ROUNDING = 1e-6
"""Of a probability, from different padding."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("h4") / "model"
    return write_model(directory, max_position_embeddings=POSITIONS)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_items(tmp_path_factory.mktemp("h4") / "items")


@pytest.fixture(autouse=True)
def no_environment_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval describes the machine after each call, which takes seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All attempts to connect; they fail."""
    tried: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        tried.append(arguments)
        raise OSError("no network in this test")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tried


def config(directory: Path, model: Path, items: Path | None, **h4: Any) -> Path:
    sections = {
        "model": {"path": str(model), "dtype": "fp32"},
        "evaluate": {"models": {"one": str(model)}, "output": str(directory)},
        "h4": {"limit": LIMIT, "batch_size": 4, **h4, **({"items": str(items)} if items else {})},
    }
    directory.mkdir(exist_ok=True)
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def written(directory: Path, name: str = "one") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "h4" / f"{name}.json").read_text())
    return found


# ---- values ------------------------------------------------------------------------------------


BOTH = [
    {"metric": name, "aggregation": "mean", "higher_is_better": True}
    for name in ("acc", "acc_norm")
]


def their_task(name: str, file: Path, shots: int, text: Any, **other: Any) -> dict[str, Any]:
    """A task dictionary for one file."""
    data = {"data_files": {"test": str(file)}, "cache_dir": str(file.parent / "cache")}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": data,
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        "num_fewshot": shots,
        "doc_to_text": text,
        "metric_list": BOTH,
        **other,
    }


def second_opinion(model: Path, items: Path) -> dict[str, dict[str, Any]]:
    """lm-eval's results for tasks whose prompts are spelled out here."""
    from lm_eval import evaluator

    arc_task = their_task(
        "arc",
        items / "arc_challenge_test.jsonl",
        25,
        "Question: {{question}}\nAnswer:",
        doc_to_choice="{{choices.text}}",
        doc_to_target="{{choices.label.index(answerKey)}}",
    )
    swag_task = their_task(
        "swag",
        items / "hellaswag_val.jsonl",
        10,
        lambda doc: f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}",
        doc_to_choice="{{endings}}",
        doc_to_target=lambda doc: int(doc["label"]),
    )
    tasks = [arc_task, swag_task]
    rows = [json.loads(line) for line in (items / "mmlu.jsonl").read_text().splitlines()]
    for subject in MMLU:
        about = "The following are multiple choice questions (with answers) about"
        mine = [row for row in rows if row["subject"] == subject]
        (items / "subjects").mkdir(exist_ok=True)
        mmlu_task = their_task(
            subject,
            write(items / "subjects" / f"{subject}.jsonl", mine),
            5,
            "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
            "D. {{choices[3]}}\nAnswer:",
            doc_to_choice=["A", "B", "C", "D"],
            doc_to_target="answer",
            description=f"{about} {subject}.\n\n",
            fewshot_config={"sampler": "first_n"},
        )
        tasks.append(mmlu_task)
    arguments = {"pretrained": str(model), "dtype": "float32"}
    found = evaluator.simple_evaluate(
        "hf", arguments, tasks, batch_size=4, device="cpu", limit=LIMIT, log_samples=False
    )
    results: dict[str, dict[str, Any]] = found["results"]
    return results


def test_values_equal_hand_written_tasks_without_network(
    model: Path,
    items: Path,
    tmp_path: Path,
    no_network: list[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = config(tmp_path / "out", model, items)
    with caplog.at_level("INFO", logger="megatron_idpo"):
        assert h4_run.main(path, []) == 0
    assert no_network == []
    found = written(tmp_path / "out")
    tasks = found["tasks"]
    assert [task["few_shot"] for task in tasks.values()] == [25, 10, 5, 0]
    assert [task["items"] for task in tasks.values()] == [LIMIT, LIMIT, 2 * LIMIT, LIMIT]
    assert tasks["arc_challenge"]["examples"] == SAME_FILE
    assert not any(task["cut"] for task in tasks.values())
    assert found["mean"] == pytest.approx(sum(task["value"] for task in tasks.values()) / 4)
    assert f"{100 * tasks['hellaswag']['value']:.2f} % of {LIMIT} items" in caplog.text
    assert (tmp_path / "out" / "h4" / "h4.md").is_file()

    theirs = second_opinion(model, items)
    for name, other in (("arc_challenge", "arc"), ("hellaswag", "swag")):
        assert tasks[name]["value"] == theirs[other]["acc_norm,none"]
        assert tasks[name]["stderr"] == pytest.approx(theirs[other]["acc_norm_stderr,none"])
    subjects = [theirs[subject]["acc,none"] for subject in MMLU]
    assert tasks["mmlu"]["value"] == pytest.approx(sum(subjects) / len(subjects))


def test_truthfulqa_is_the_probability_of_true_answers(
    model: Path, items: Path, tmp_path: Path
) -> None:
    """Computed with Transformers, one answer at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = config(tmp_path / "out", model, items, tasks=["truthfulqa_mc2"])
    assert h4_run.main(path, []) == 0
    task = written(tmp_path / "out")["tasks"]["truthfulqa_mc2"]
    assert (task["metric"], task["examples"]) == ("mc2", "fixed, part of the task")

    name = "truthfulqa_mc2"
    loaded = h4_tasks.task_manager().load(task_specs(H4[name], read_items(items, [name])[name]))
    [lm_eval_task] = loaded["tasks"].values()
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    shares = []
    for row in [json.loads(line) for line in (items / "truthfulqa_mc.jsonl").open()][:LIMIT]:
        prompt = lm_eval_task.doc_to_text(row)
        assert prompt.endswith(f"\n\nQ: {row['question']}\nA:") and prompt.count("Q: ") == 7
        chances = []
        for choice in row["mc2_targets"]["choices"]:
            ids = torch.tensor(tokenizer(f"{prompt} {choice}")["input_ids"])
            length = len(tokenizer(f" {choice}")["input_ids"])
            with torch.no_grad():
                logits = network(ids[None, :-1]).logits[0].log_softmax(-1)
            logp = logits[-length:].gather(-1, ids[-length:, None]).sum()
            chances.append(float(logp.double().exp()))
        true = row["mc2_targets"]["labels"].count(1)
        shares.append(sum(chances[:true]) / sum(chances))
    assert task["value"] == pytest.approx(sum(shares) / LIMIT, rel=1e-3)


@pytest.mark.parametrize("name", ["arc_challenge", "hellaswag", "mmlu"])
def test_item_is_not_its_own_example(items: Path, name: str) -> None:
    """With as few items as possible, the prompt has the asked one once, without its answer."""
    task = H4[name]
    found = read_items(items, [name])[name]
    rows = [row for row in found.asked if row.get("subject", "virology") == "virology"]
    few = type(found)(found.file, rows[: task.few_shot + 1], None, found.digests)
    loaded = h4_tasks.task_manager().load(task_specs(task, few))
    [lm_eval_task] = loaded["tasks"].values()
    lm_eval_task.set_config("num_fewshot", task.few_shot)
    lm_eval_task.set_fewshot_seed(1234)
    lm_eval_task.build_all_requests()
    asked = [lm_eval_task.doc_to_text(doc) for doc in lm_eval_task.eval_docs]
    assert len(asked) == task.few_shot + 1
    for instance in lm_eval_task.instances:
        context = instance.args[0]
        assert all(context.count(text) == 1 for text in asked)
        assert context.endswith(asked[instance.doc_id])


# ---- resuming and errors -----------------------------------------------------------------------


def test_finished_tasks_are_not_evaluated_again(
    model: Path,
    items: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    path = config(out, model, items, tasks=["truthfulqa_mc2"])
    h4_run.main(path, [])
    first = written(out)
    asked: list[str] = []
    evaluate = h4_tasks.LmEvalModel.evaluate

    def recorded(self: Any, task: Any, *arguments: Any) -> Any:
        asked.append(task.name)
        return evaluate(self, task, *arguments)

    monkeypatch.setattr(h4_tasks.LmEvalModel, "evaluate", recorded)
    with caplog.at_level("INFO", logger="megatron_idpo"):
        h4_run.main(path, [])
    assert asked == [] and written(out) == first
    assert "one: already evaluated" in caplog.text
    h4_run.main(path, ["h4.tasks=[mmlu, truthfulqa_mc2]"])
    assert asked == ["mmlu"]
    assert written(out)["tasks"]["truthfulqa_mc2"] == first["tasks"]["truthfulqa_mc2"]
    with pytest.raises(ConfigError, match=r"h4\.limit was 2, is now 3"):
        h4_run.main(path, ["h4.limit=3"])
    (model / "config.json").touch()
    assert h4_run.main(path, []) == 0, "a new modification time is not a change"


def test_cut_prompts_are_counted_and_reported(
    items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = write_model(tmp_path / "small", max_position_embeddings=300)
    path = config(tmp_path / "out", small, items, tasks=["hellaswag"], limit=2)
    assert h4_run.main(path, []) == 0
    assert written(tmp_path / "out")["tasks"]["hellaswag"]["cut"] == 8
    message = " ".join(capsys.readouterr().out.split())
    assert "HellaSwag: 8 prompts were longer than the model's context" in message


def test_adapter_changes_the_value(model: Path, items: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(network, settings).save_pretrained(tmp_path / "adapter")
    models = {
        "plain": str(model),
        "adapted": {"path": str(model), "adapter": str(tmp_path / "adapter")},
    }
    path = config(tmp_path / "out", model, items, tasks=["truthfulqa_mc2"])
    assert h4_run.main(path, [f"evaluate.models={json.dumps(models)}"]) == 0
    plain, adapted = (written(tmp_path / "out", name) for name in models)
    task = "truthfulqa_mc2"
    assert abs(plain["tasks"][task]["value"] - adapted["tasks"][task]["value"]) > ROUNDING


def test_too_few_items_are_reported_before_a_model_is_loaded(model: Path, tmp_path: Path) -> None:
    write(tmp_path / "arc_challenge.jsonl", arc(25))
    path = config(tmp_path / "out", tmp_path / "no-model", tmp_path, tasks=["arc_challenge"])
    with pytest.raises(DataError, match="25 distinct items to take 25 examples from"):
        h4_run.main(path, [])
    write(tmp_path / "mmlu.jsonl", mmlu({"anatomy": 6, "virology": 5}))
    with pytest.raises(DataError, match="5 distinct items of virology"):
        h4_run.main(path, ["h4.tasks=[mmlu]"])
    write(tmp_path / "hellaswag.jsonl", hellaswag(2))
    write(tmp_path / "hellaswag_train.jsonl", hellaswag(10, seed=1))
    with pytest.raises(DataError, match=r"hellaswag_train\.jsonl: .* at least 11"):
        h4_run.main(path, ["h4.tasks=[hellaswag]"])


def test_unknown_subject_is_reported(model: Path, tmp_path: Path) -> None:
    write(tmp_path / "mmlu.jsonl", mmlu({"alchemy": 6}))
    path = config(tmp_path / "out", model, tmp_path, tasks=["mmlu"])
    with pytest.raises(DataError, match="has no subject alchemy"):
        h4_run.main(path, [])


def test_unreachable_hub_is_reported(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", offline)
    path = config(tmp_path / "out", model, None, tasks=["hellaswag"])
    with pytest.raises(ConfigError, match=r"h4\.items: is null, and the hub does not provide"):
        h4_run.main(path, [])


def test_models_that_transformers_cannot_load(
    model: Path, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "metadata.json").write_text("{}")
    with pytest.raises(CheckpointError, match="convert megatron-to-hf"):
        h4_run.main(config(tmp_path / "a", ours, items), [])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="Transformers cannot load it"):
        h4_run.main(config(tmp_path / "b", empty, items), [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        h4_run.main(config(tmp_path / "c", model, items), [])


@pytest.mark.parametrize("error", [RuntimeError("sizes"), ModuleNotFoundError("no peft")])
def test_any_loading_error_is_reported(
    model: Path, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("lm_eval.models.huggingface.HFLM", Mock(side_effect=error))
    with pytest.raises(CheckpointError, match=f"load it: {type(error).__name__}: {error}"):
        h4_run.main(config(tmp_path / "out", model, items), [])


def test_nan_value_is_reported(
    model: Path, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"acc_norm,none": float("nan"), "acc_norm_stderr,none": 0.0, "sample_len": 2}
    output = {"results": {"arc_challenge": values}}
    monkeypatch.setattr("lm_eval.evaluator.simple_evaluate", lambda *_, **__: output)
    with pytest.raises(CheckpointError, match=r"has no value in ARC \(nan\)"):
        h4_run.main(config(tmp_path / "out", model, items), [])
    assert not list((tmp_path / "out/h4").iterdir())


def test_out_of_memory_is_reported(
    model: Path, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("2.00 GiB")

    monkeypatch.setattr("lm_eval.evaluator.simple_evaluate", full)
    with pytest.raises(ConfigError, match=r"h4\.batch_size: ARC does not fit into memory"):
        h4_run.main(config(tmp_path / "out", model, items), [])


def test_example_file_keeps_the_splits_of_the_task(items: Path, tmp_path: Path) -> None:
    """With a file for the examples, only the data of the task file is replaced."""
    write(tmp_path / "hellaswag.jsonl", hellaswag(2))
    write(tmp_path / "hellaswag_train.jsonl", hellaswag(11, seed=1))
    found = read_items(tmp_path, ["hellaswag"])["hellaswag"]
    [group] = task_specs(H4["hellaswag"], found)
    [member] = group["task"]
    assert set(member) == {"task", "custom_dataset"}
    data = member["custom_dataset"]()
    assert {name: len(split) for name, split in data.items()} == {"validation": 2, "train": 11}


def test_other_sections_are_refused(tmp_path: Path, model: Path, items: Path) -> None:
    path = config(tmp_path / "out", model, items)
    with pytest.raises(ConfigError, match=r"generate .*: has no effect"):
        h4_run.main(path, ["generate.temperature=1"])
