"""Lines at the start and the end of a run: they are true, paths exist, the command works."""

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_idpo.errors import EXIT_PREEMPTED

from .run_hooks import stop_after
from .tiny_run import HELD_OUT, LORA, Files, Outcome, run, write_config

pytestmark = pytest.mark.distributed

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)


@pytest.fixture(scope="module")
def trained(tiny: Files, workers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trains two steps with other sections; returns the outcome and the output directory."""

    def train(*hooks: Any, **sections: Any) -> tuple[Outcome, Path]:
        output = tmp_path_factory.mktemp("trained") / "a run"
        training = {"max_steps": 2, **sections.pop("training", {})}
        file = write_config(tiny, output, training=training, **sections)
        return workers.run(run, 1, file, *hooks)[0], output

    return train


def test_first_lines_describe_the_run(trained, tiny):
    outcome, _ = trained(lora=LORA, data={"eval": str(tiny.held_out)})
    first, few, second = outcome.printed.splitlines()[:3]
    assert first == f"24 pairs to train on, {HELD_OUT} held out; 2 steps of 6 pairs"
    interval = "an accuracy of 0.5 has the 95 % interval [0.17, 0.83]; hold out more"
    assert few.startswith(f"only {HELD_OUT} held-out pairs: {interval}")
    assert second.startswith("training LoRA rank 4 on q_proj, k_proj, v_proj, o_proj, gate_proj")
    assert second.endswith("intermediate layers: 1, 3 of 4")


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"max_steps": 3}, "3 steps of 7 pairs, 3 pairs dropped (incomplete batch)"),
        ({"max_steps": 2}, "2 steps of 7 pairs"),  # it ends before it reaches them
    ],
)
def test_dropped_pairs_are_reported(trained, training, message):
    training |= {"epochs": 1, "global_batch_pairs": 7, "export": False}
    outcome, _ = trained(training=training)
    assert outcome.printed.splitlines()[0] == f"24 pairs to train on, 0 held out; {message}"


def test_text_without_chat_template_is_reported(trained):
    message = "data: 24 pairs: text is trained without the chat template"
    short = {"export": False}
    for data, is_reported in (
        ({"chat_template": TEMPLATE}, True),
        ({"chat_template": TEMPLATE, "format": "text"}, False),
        ({}, False),
    ):
        outcome, _ = trained(data=data, training=short)
        assert (message in outcome.printed) == is_reported
        assert ("data:" in outcome.printed) == is_reported


def test_run_that_does_not_start_at_its_reference_has_no_start_check(trained):
    message = "reference: the model without lora.adapter; no start check"
    short = {"export": False}
    first, output = trained(lora=LORA)
    assert "start check passed" in first.printed and "reference:" not in first.printed
    adapter = {"adapter": str(output / "adapter")}
    second, _ = trained(lora=LORA | adapter, training=short)
    assert message in second.printed.splitlines() and "start check passed" not in second.printed
    third, _ = trained(lora=LORA | adapter, training=short, reference={"source": "none"})
    assert "reference:" not in third.printed


def test_plain_dpo_full_training(trained):
    objective = {"layers": [], "intermediate_weight": 0.0}
    outcome, output = trained(objective=objective, training={"export": False})
    lines = outcome.printed.splitlines()
    assert "training all weights; plain DPO (4 layers, no taps)" in lines
    assert f"state    {output / 'checkpoints'}" in lines
    assert "try it:" not in lines and "adapter" not in outcome.printed


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_printed_paths_exist_and_the_command_generates(trained, capsys, chat):
    outcome, output = trained(lora=LORA, **({"data": {"chat_template": TEMPLATE}} if chat else {}))
    paths = dict(
        line.split(maxsplit=1)
        for line in outcome.printed.splitlines()
        if line.startswith(("curves ", "metrics ", "model ", "adapter "))
    )
    assert paths == {
        "curves": str(output / "curves.png"),
        "metrics": str(output / "metrics.jsonl"),
        "model": str(output / "hf"),
        "adapter": str(output / "adapter"),
    }
    assert all(Path(path).exists() for path in paths.values())
    python, option, code = shlex.split(outcome.printed.splitlines()[-1])
    assert (python, option) == ("python", "-c")
    assert ("role" in code) == chat
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_stopped_run_says_how_to_resume(trained):
    outcome, output = trained(stop_after(2), training={"max_steps": 4})
    (line,) = (line for line in outcome.printed.splitlines() if "stopped by a signal" in line)
    assert "after step 2" in line and str(output / "checkpoints") in line
    assert f"exit code {EXIT_PREEMPTED}" in line and "the same command resumes" in line
    assert (output / "checkpoints").is_dir() and "try it" not in outcome.printed


def test_other_ranks_print_nothing():
    from megatron_idpo.train.messages import report_finished

    report_finished(SimpleNamespace(world=SimpleNamespace(is_first=False)), None, [])  # type: ignore
