"""The verb `judge`: compare answers pairwise, and report win rates.

    OUTPUT/judge/A-vs-B/
      settings.json, verdicts.jsonl      `verdicts.py`
      result.json                        `Tally.result`

Everything is checked before the first question: answers, template, stored verdicts, key, cost. The
result of each comparison is written as soon as it is complete.
"""

import importlib.util
import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_idpo.config.evaluate import JudgeConfig
from megatron_idpo.config.load import load_config
from megatron_idpo.console.progress import show_progress
from megatron_idpo.errors import ConfigError, DataError, Problem
from megatron_idpo.evaluate.judge.comparison import Comparison, Judge, Question, load_comparisons
from megatron_idpo.evaluate.judge.endpoint import Endpoint, checked_url
from megatron_idpo.evaluate.judge.tally import Tally
from megatron_idpo.evaluate.judge.template import JudgeTemplate
from megatron_idpo.evaluate.judge.verdicts import Order, Verdict, VerdictStore, open_verdicts
from megatron_idpo.evaluate.models import evaluation_output, write_result

logger = logging.getLogger(__name__)

REQUIRED = ("judge",)
OPTIONAL = ("evaluate", "training")

_BYTES_PER_TOKEN = 4
_CHAT_FORMAT_TOKENS = 12
"""Per request: roles and other markup around two messages."""

_TOKENS_PER_PRICE = 1_000_000


@dataclass(frozen=True, slots=True)
class _Task:
    """One comparison with its stored verdicts and open questions."""

    comparison: Comparison
    store: VerdictStore
    questions: list[Question]


def main(path: Path, overrides: Sequence[str]) -> int:
    """Judges every comparison of a configuration, or what is missing of it.

    Returns:
        The exit code.

    Raises:
        UserError: a check fails, the judge is unusable, or too many prompts have no verdict;
            verdicts are kept.
    """
    config = load_config(path, overrides, required=REQUIRED, optional=OPTIONAL)
    settings = config.judge
    if settings is None:
        raise ConfigError.at(
            "judge",
            "is missing",
            "add it, for example `judge: {model: gpt-4o-mini}`; docs/evaluation.md",
        )
    comparisons = load_comparisons(config, evaluation_output(config))
    template = None if settings.kind == "reward" else JudgeTemplate.load(settings.template)
    # A reward model scores each answer on its own, so the order does not matter.
    orders: tuple[Order, ...] = ("ab", "ba") if template else ("both",)
    judge_settings = _judge_settings(settings, template)
    with ExitStack() as stores:
        tasks = []
        for comparison in comparisons:
            opened = open_verdicts(comparison.directory, comparison.settings | judge_settings)
            store = stores.enter_context(opened)
            tasks.append(_Task(comparison, store, comparison.open_questions(store, orders)))
            logger.info(_plan(tasks[-1], settings))
        judge = _load_judge(settings, template, [q for task in tasks for q in task.questions])
        tallies = []
        for task in tasks:
            if judge is not None and task.questions:
                _ask(judge, task)
            tallies.append(_write_result(task, settings, orders))
        _report(tasks, tallies, settings)
    return 0


def _judge_settings(settings: JudgeConfig, template: JudgeTemplate | None) -> dict[str, Any]:
    """The settings that all comparisons by this judge share."""
    values: dict[str, Any] = {"kind": settings.kind, "judge": settings.model}
    if template is not None:
        values["template"] = {"name": template.name, "sha256": template.digest}
    if settings.kind == "api":
        # Without max_tokens: a reply that was cut off has no verdict, and the others do not change.
        return values | {"base_url": checked_url(settings.base_url), "temperature": 0}
    from megatron_idpo.evaluate.judge.local import model_identity

    return values | {"weights": model_identity(settings.model)}


def _plan(task: _Task, settings: JudgeConfig) -> str:
    """One line: what is asked about a comparison."""
    prompts = f"{len(task.comparison.answers):,} prompts"
    orders = "" if settings.kind == "reward" else " in both orders"
    stored = sum(not verdict.is_identical for verdict in task.store.verdicts.values())
    earlier = f"; {stored:,} verdicts from an earlier run" if stored else ""
    questions = f"{len(task.questions):,} questions to ask"
    return (
        f"{task.comparison.title}, judge {settings.model}: {prompts}{orders}{earlier}; {questions}"
    )


def _load_judge(
    settings: JudgeConfig, template: JudgeTemplate | None, questions: Sequence[Question]
) -> Judge | None:
    """Loads a local judge, or announces the cost of a judge behind an endpoint.

    Returns:
        None if there is nothing to ask: then neither a key nor a model is needed.

    Raises:
        UserError: it cannot be loaded, there is no key, or it would cost too much.
    """
    if not questions:
        return None
    if settings.kind == "api":
        assert template is not None
        if importlib.util.find_spec("openai") is None:
            remedy = "pip install 'openai>=1.60', or set judge.kind to a local judge"
            raise ConfigError.at("judge.kind", "is api, but openai is not installed", remedy)
        endpoint = Endpoint.of(settings)
        if endpoint.sends_key_in_plaintext:
            name = settings.key_variable
            logger.warning(
                "%s is not encrypted: the key in %s is sent in plain text", endpoint.url, name
            )
        from megatron_idpo.evaluate.judge.api import ApiJudge

        logger.info(estimate_cost(questions, template, settings))
        return ApiJudge(settings, endpoint, template)
    from megatron_idpo.evaluate.judge.local import LanguageModelJudge, RewardJudge

    if template is None:
        return RewardJudge(settings.model)
    return LanguageModelJudge(settings.model, template)


def estimate_cost(
    questions: Sequence[Question], template: JudgeTemplate, settings: JudgeConfig
) -> str:
    """One line with an upper estimate of the tokens and the cost of all requests.

    Input tokens are estimated as one per four bytes, because endpoints do not publish their
    tokenizers; output tokens as `judge.max_tokens` per reply. Repeated requests are not included.

    Raises:
        ConfigError: the cost is above `judge.max_cost`.
    """
    inputs = 0
    for question in questions:
        messages = template.messages(question.prompt, *question.shown)
        size_bytes = sum(len(message["content"].encode()) for message in messages)
        inputs += size_bytes // _BYTES_PER_TOKEN + _CHAT_FORMAT_TOKENS
    outputs = len(questions) * settings.max_tokens
    tokens = f"{inputs:,} input and at most {outputs:,} output tokens"
    cost = _cost(inputs, outputs, settings)
    if cost is None:
        return f"about {tokens}; set judge.input_price and output_price to see the cost"
    if settings.max_cost is not None and cost > settings.max_cost:
        message = f"is {settings.max_cost:g}, but the questions may cost {cost:.4g} ({tokens})"
        remedy = "raise it, or lower judge.max_prompts or judge.max_tokens"
        raise ConfigError.at("judge.max_cost", message, remedy)
    return f"about {tokens}: up to {cost:.4g}"


def _cost(input_tokens: int, output_tokens: int, settings: JudgeConfig) -> float | None:
    """In the currency of the prices; None without prices."""
    if settings.input_price is None or settings.output_price is None:
        return None
    cost = input_tokens * settings.input_price + output_tokens * settings.output_price
    return cost / _TOKENS_PER_PRICE


def _ask(judge: Judge, task: _Task) -> None:
    """Asks the open questions of a comparison, and stores each verdict on arrival."""
    failures = 0
    title, total = task.comparison.title, len(task.questions)
    with show_progress(title, total, unit="questions") as progress:

        def done(verdict: Verdict) -> None:
            nonlocal failures
            task.store.add(verdict)
            failures += verdict.verdict is None
            progress.advance(status=f"{failures:,} without a verdict" if failures else "")

        judge.ask(task.questions, done)


def _write_result(task: _Task, settings: JudgeConfig, orders: tuple[Order, ...]) -> Tally:
    """Counts the verdicts of a comparison, and writes `result.json`."""
    comparison = task.comparison
    tally = Tally.of(task.store.verdicts, len(comparison.answers), orders)
    result = tally.result(comparison.a, comparison.b, settings.model, settings.kind)
    result["input_tokens"], result["output_tokens"] = task.store.used_tokens
    text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_result(comparison.directory / "result.json", text)
    return tally


def _report(tasks: Sequence[_Task], tallies: Sequence[Tally], settings: JudgeConfig) -> None:
    """Prints one sentence per comparison, and the tokens used.

    Raises:
        DataError: lists the comparisons with too many unjudged prompts.
    """
    lines, problems = [], []
    for task, tally in zip(tasks, tallies, strict=True):
        directory = task.comparison.directory
        lines.append(tally.summary(task.comparison.a, task.comparison.b))
        if tally.disagreed:
            reason = "the verdict flipped when the answers were swapped"
            lines.append(f"  {tally.disagreed} of {tally.ties} ties: {reason}")
        lines.append(f"  results: {directory}")
        if not tally.is_enough:
            message = f"{tally.unjudged} of {tally.prompts} prompts have no verdict"
            remedy = "see the notes there; the same command asks these questions again"
            problems.append(Problem(str(directory / "verdicts.jsonl"), message, remedy))
    if settings.kind == "api":
        inputs, outputs = (sum(task.store.used_tokens[side] for task in tasks) for side in (0, 1))
        cost = _cost(inputs, outputs, settings)
        tokens = f"{inputs:,} input and {outputs:,} output tokens, earlier runs included"
        lines.append(tokens if cost is None else f"{tokens}: {cost:.4g}")
    Console(highlight=False).print("\n".join(lines), soft_wrap=True, markup=False)
    if problems:
        raise DataError.of(problems)
