"""Judging from a configuration to who wins, as named steps.

    evaluation/judge/A-vs-B/
      settings.json, verdicts.jsonl      `verdicts.py`
      result.json                        `tally.py`

Everything is looked at before the first question is put: answers, template, what earlier verdicts
are of, key, cost. Then one comparison after the other is judged, its result written at once.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from megatron_idpo.config.evaluate import JudgeConfig
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import ConfigError, DataError, Problem
from megatron_idpo.evaluate.judge.comparison import Comparison, comparisons
from megatron_idpo.evaluate.judge.cost import Estimate, cost_of
from megatron_idpo.evaluate.judge.endpoint import Endpoint, checked_url
from megatron_idpo.evaluate.judge.progress import judging
from megatron_idpo.evaluate.judge.question import BOTH_ORDERS, Judge, Question
from megatron_idpo.evaluate.judge.table import result_table
from megatron_idpo.evaluate.judge.tally import Tally
from megatron_idpo.evaluate.judge.template import JudgeTemplate
from megatron_idpo.evaluate.judge.verdicts import IDENTICAL, Order, Verdict, VerdictStore
from megatron_idpo.evaluate.models import evaluation_directory
from megatron_idpo.evaluate.result_files import write_text


@dataclass(frozen=True, slots=True)
class _Task:
    """One comparison, its verdicts so far, and what is left to ask."""

    comparison: Comparison
    store: VerdictStore
    directory: Path
    left: list[Question]


def judge(config: RunConfig, settings: JudgeConfig, environment: Mapping[str, str]) -> int:
    """Judge every comparison of a configuration, or what is missing of it.

    Args:
        config: of the run.
        settings: its section `judge`.
        environment: has the key.

    Returns:
        0.

    Raises:
        UserError: it cannot be done, or too many prompts stayed without a verdict; what was judged
            is kept.
    """
    console = Console(highlight=False)
    output = evaluation_directory(config)
    found = comparisons(config, output)
    template = None if settings.kind == "reward" else JudgeTemplate.load(settings.template)
    orders: tuple[Order, ...] = BOTH_ORDERS if template else ("both",)
    common = _common_settings(settings, template)
    with ExitStack() as stores:
        tasks = []
        for comparison in found:
            directory = output / "judge" / comparison.name
            store = stores.enter_context(
                VerdictStore(directory, _own_settings(comparison) | common)
            )
            tasks.append(_task(comparison, store, directory, orders))
        judging_one = _judge(settings, template, environment, tasks, console)
        results = []
        for task in tasks:
            if judging_one is not None:
                _ask(judging_one, task, console)
            results.append(_conclude(task, settings, orders))
        _tell(results, tasks, settings, console)
    _check_enough(results, tasks)
    return 0


def _common_settings(settings: JudgeConfig, template: JudgeTemplate | None) -> dict[str, Any]:
    """What all verdicts of this judge have in common."""
    found: dict[str, Any] = {"kind": settings.kind, "judge": settings.model}
    if template is not None:
        found["template"] = {"name": template.name, "sha256": template.digest}
    if settings.kind == "api":
        # Not `max_tokens`: an answer that was cut off has no verdict, and others are the same.
        found |= {"base_url": checked_url(settings.base_url), "temperature": 0}
    else:
        from megatron_idpo.evaluate.judge.local import model_identity

        found["weights"] = model_identity(settings.model)
    return found


def _own_settings(comparison: Comparison) -> dict[str, Any]:
    digests = {"a": comparison.answers_a.digest, "b": comparison.answers_b.digest}
    return {"a": comparison.a, "b": comparison.b, "answers": digests}


def _task(
    comparison: Comparison, store: VerdictStore, directory: Path, orders: tuple[Order, ...]
) -> _Task:
    """What is left of a comparison; identical answers have their verdict afterwards."""
    for index in range(comparison.prompts):
        if comparison.is_identical(index) and (index, "both") not in store.standing:
            store.add(Verdict(index=index, order="both", verdict="tie", note=IDENTICAL))
    return _Task(comparison, store, directory, comparison.left(store, orders))


def _judge(
    settings: JudgeConfig,
    template: JudgeTemplate | None,
    environment: Mapping[str, str],
    tasks: Sequence[_Task],
    console: Console,
) -> Judge | None:
    """The judge, after the user has been told what it is going to be asked; None: nothing.

    Raises:
        UserError: there is none, or it would cost too much.
    """
    left = [question for task in tasks for question in task.left]
    for task in tasks:
        _say(console, _plan(task, settings))
    if not left:
        return None
    if settings.kind == "api":
        assert template is not None
        _check_library()
        endpoint = Endpoint.of(settings, environment)
        if endpoint.is_overheard:
            message = "whoever listens on the network reads the key in"
            _say(console, f"{endpoint.url} is not encrypted: {message} {settings.key_variable}")
        from megatron_idpo.evaluate.judge.api import ApiJudge

        chats = (template.chat(question.prompt, *question.shown) for question in left)
        _say(console, Estimate.of(chats, settings.max_tokens).summary(settings))
        return ApiJudge(settings, endpoint, template, lambda line: _say(console, line))
    from megatron_idpo.evaluate.judge.local import LanguageModelJudge, RewardJudge

    if template is None:
        return RewardJudge(settings.model)
    return LanguageModelJudge(settings.model, template)


def _check_library() -> None:
    """The client is there, which an evaluation without endpoints does not need."""
    if importlib.util.find_spec("openai") is None:
        remedy = "pip install 'megatron-idpo[judge]', or set judge.kind to a local judge"
        raise ConfigError.at("judge.kind", "is api, but openai is not installed", remedy)


def _plan(task: _Task, settings: JudgeConfig) -> str:
    """What is going to be asked about one comparison."""
    comparison, standing = task.comparison, task.store.standing
    same = sum(map(comparison.is_identical, range(comparison.prompts)))
    before = len(standing) - sum(verdict.is_identical for verdict in standing.values())
    message = f"{comparison.a} against {comparison.b} by {settings.model}: "
    message += f"{comparison.prompts:,} prompts"
    message += ", each in both orders" if settings.kind != "reward" else ""
    message += f"; {same:,} with identical answers" if same else ""
    message += f"; {before:,} verdicts are there already" if before else ""
    return f"{message}; {len(task.left):,} questions to put"


def _ask(judge: Judge, task: _Task, console: Console) -> None:
    if not task.left:
        return
    what = f"{task.comparison.a} against {task.comparison.b}"
    with judging(what, len(task.left), console) as step:

        def done(verdict: Verdict) -> None:
            task.store.add(verdict)
            step(verdict.verdict is not None)

        judge.ask(task.left, done)


def _conclude(task: _Task, settings: JudgeConfig, orders: tuple[Order, ...]) -> Tally:
    """Count, and write the result."""
    comparison = task.comparison
    tally = Tally.of(task.store.standing, comparison.prompts, orders)
    result = tally.result(comparison.a, comparison.b, settings.model, settings.kind)
    input_tokens, output_tokens = task.store.used_tokens
    result |= {"input_tokens": input_tokens, "output_tokens": output_tokens}
    text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(task.directory / "result.json", text)
    return tally


def _tell(
    results: Sequence[Tally], tasks: Sequence[_Task], settings: JudgeConfig, console: Console
) -> None:
    """The table, a sentence for each comparison, and what it took."""
    names = [(task.comparison.a, task.comparison.b) for task in tasks]
    console.print(result_table(names, results))
    for (a, b), tally in zip(names, results, strict=True):
        _say(console, tally.summary(a, b))
        if tally.disagreed:
            message = (
                f"{tally.disagreed} of {tally.ties} ties are the judge's, who decided otherwise"
            )
            _say(console, f"  {message} when the answers changed places")
    if settings.kind == "api":
        inputs, outputs = (sum(task.store.used_tokens[side] for task in tasks) for side in (0, 1))
        cost = cost_of(inputs, outputs, settings)
        message = f"{inputs:,} input and {outputs:,} output tokens"
        _say(console, f"{message} in all, earlier starts included{_format_cost(cost)}")
    for task in tasks:
        _say(console, f"written: {task.directory}")


def _format_cost(cost: float | None) -> str:
    return "" if cost is None else f": {cost:.4g}"


def _check_enough(results: Sequence[Tally], tasks: Sequence[_Task]) -> None:
    """Nearly every prompt has a verdict.

    Raises:
        DataError: naming each comparison in which too many have none.
    """
    problems = []
    for tally, task in zip(results, tasks, strict=True):
        if tally.is_enough:
            continue
        message = f"{tally.unjudged} of {tally.prompts} prompts have no verdict"
        remedy = "its notes say why; the same command asks for these again"
        problems.append(Problem(str(task.directory / "verdicts.jsonl"), message, remedy))
    if problems:
        raise DataError.of(problems)


def _say(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)
