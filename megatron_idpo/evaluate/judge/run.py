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
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_idpo.config.evaluate import JudgeConfig
from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.console.progress import show_progress
from megatron_idpo.errors import ConfigError, DataError, Problem
from megatron_idpo.evaluate.judge.comparison import Comparison, Judge, Question, load_comparisons
from megatron_idpo.evaluate.judge.endpoint import Endpoint, checked_url
from megatron_idpo.evaluate.judge.tally import Tally, result_table
from megatron_idpo.evaluate.judge.template import Chat, JudgeTemplate
from megatron_idpo.evaluate.judge.verdicts import (
    IDENTICAL,
    Order,
    Verdict,
    VerdictStore,
    open_verdicts,
)
from megatron_idpo.evaluate.models import evaluation_output, write_result

logger = logging.getLogger(__name__)

REQUIRED = ("judge",)
OPTIONAL = ("evaluate", "training")

_BYTES_PER_TOKEN = 4
_CHAT_FORMAT_TOKENS = 12
"""Per request: roles and other markup around two messages."""

_TOKENS_PER_PRICE = 1_000_000


def main(path: Path, overrides: Sequence[str]) -> int:
    """Judges all comparisons of a configuration; returns the exit code.

    Raises:
        UserError: see `judge`.
    """
    config = load_config(path, overrides, required=REQUIRED, optional=OPTIONAL)
    if config.judge is None:
        raise ConfigError.at("judge", "is missing", "add it; judge.model names the judge")
    judge(config, config.judge, os.environ)
    return 0


@dataclass(frozen=True, slots=True)
class _Task:
    """One comparison with its stored verdicts and open questions."""

    comparison: Comparison
    store: VerdictStore
    directory: Path
    questions: list[Question]

    @property
    def title(self) -> str:
        return f"{self.comparison.a} against {self.comparison.b}"


def judge(config: RunConfig, settings: JudgeConfig, environment: Mapping[str, str]) -> None:
    """Judges every comparison of a configuration, or what is missing of it.

    Args:
        config: of the run.
        settings: its section `judge`.
        environment: with the key.

    Raises:
        UserError: a check fails, the judge is unusable, or too many prompts have no verdict;
            verdicts are kept.
    """
    output = evaluation_output(config)
    comparisons = load_comparisons(config, output)
    template = None if settings.kind == "reward" else JudgeTemplate.load(settings.template)
    # A reward model scores each answer on its own, so the order does not matter.
    orders: tuple[Order, ...] = ("ab", "ba") if template else ("both",)
    judge_settings = _judge_settings(settings, template)
    with ExitStack() as stores:
        tasks = []
        for comparison in comparisons:
            directory = output / "judge" / comparison.name
            own_settings = {
                "a": comparison.a,
                "b": comparison.b,
                "answers": {"a": comparison.answers_a.digest, "b": comparison.answers_b.digest},
            }
            store = stores.enter_context(open_verdicts(directory, own_settings | judge_settings))
            _add_identical(comparison, store)
            questions = comparison.open_questions(store, orders)
            tasks.append(_Task(comparison, store, directory, questions))
        for task in tasks:
            logger.info(_plan(task, settings))
        asked = _load_judge(settings, template, environment, tasks)
        tallies = []
        for task in tasks:
            if asked is not None and task.questions:
                _ask(asked, task)
            tallies.append(_write_result(task, settings, orders))
        _report(tallies, tasks, settings)
    _check_enough(tallies, tasks)


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


def _add_identical(comparison: Comparison, store: VerdictStore) -> None:
    """Stores a tie for each pair of identical answers."""
    for index in range(comparison.num_prompts):
        if comparison.is_identical(index) and (index, "both") not in store.verdicts:
            store.add(Verdict(index=index, order="both", verdict="tie", note=IDENTICAL))


def _load_judge(
    settings: JudgeConfig,
    template: JudgeTemplate | None,
    environment: Mapping[str, str],
    tasks: Sequence[_Task],
) -> Judge | None:
    """Loads a local judge, or announces the cost of a judge behind an endpoint.

    Returns:
        None if there is nothing to ask: then neither a key nor a model is needed.

    Raises:
        UserError: it cannot be loaded, there is no key, or it would cost too much.
    """
    questions = [question for task in tasks for question in task.questions]
    if not questions:
        return None
    if settings.kind == "api":
        assert template is not None
        if importlib.util.find_spec("openai") is None:
            remedy = "pip install 'megatron-idpo[judge]', or set judge.kind to a local judge"
            raise ConfigError.at("judge.kind", "is api, but openai is not installed", remedy)
        endpoint = Endpoint.of(settings, environment)
        if endpoint.sends_key_in_plaintext:
            logger.warning(
                "%s is not encrypted: the key in %s is sent in plain text",
                endpoint.url,
                settings.key_variable,
            )
        from megatron_idpo.evaluate.judge.api import ApiJudge

        chats = (template.chat(question.prompt, *question.shown) for question in questions)
        logger.info(estimate_cost(chats, settings))
        return ApiJudge(settings, endpoint, template)
    from megatron_idpo.evaluate.judge.local import LanguageModelJudge, RewardJudge

    if template is None:
        return RewardJudge(settings.model)
    return LanguageModelJudge(settings.model, template)


def estimate_cost(chats: Iterable[Chat], settings: JudgeConfig) -> str:
    """One line with an upper estimate of the tokens and the cost of all requests.

    Input tokens are estimated as one per four bytes, because endpoints do not publish their
    tokenizers; output tokens as `judge.max_tokens` per reply. Repeated requests are not included.

    Raises:
        ConfigError: the cost is above `judge.max_cost`.
    """
    sizes_bytes = [len((chat.system + chat.user).encode()) for chat in chats]
    inputs = sum(size // _BYTES_PER_TOKEN + _CHAT_FORMAT_TOKENS for size in sizes_bytes)
    outputs = len(sizes_bytes) * settings.max_tokens
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


def _plan(task: _Task, settings: JudgeConfig) -> str:
    """One line: what is asked about a comparison."""
    comparison, verdicts = task.comparison, task.store.verdicts.values()
    identical = sum(map(comparison.is_identical, range(comparison.num_prompts)))
    stored = sum(not verdict.is_identical for verdict in verdicts)
    parts = [f"{task.title}, judge {settings.model}: {comparison.num_prompts:,} prompts"]
    if settings.kind != "reward":
        parts[0] += " in both orders"
    if identical:
        parts.append(f"{identical:,} with identical answers")
    if stored:
        parts.append(f"{stored:,} verdicts from an earlier run")
    return "; ".join([*parts, f"{len(task.questions):,} questions to ask"])


def _ask(judge: Judge, task: _Task) -> None:
    """Asks the open questions of a comparison, and stores each verdict on arrival."""
    failures = 0
    with show_progress(task.title, len(task.questions), unit="questions") as progress:

        def done(verdict: Verdict) -> None:
            nonlocal failures
            task.store.add(verdict)
            failures += verdict.verdict is None
            progress.advance(status=f"{failures:,} without a verdict" if failures else "")

        judge.ask(task.questions, done)


def _write_result(task: _Task, settings: JudgeConfig, orders: tuple[Order, ...]) -> Tally:
    """Counts the verdicts of a comparison, and writes `result.json`."""
    comparison = task.comparison
    tally = Tally.of(task.store.verdicts, comparison.num_prompts, orders)
    result = tally.result(comparison.a, comparison.b, settings.model, settings.kind)
    result["input_tokens"], result["output_tokens"] = task.store.used_tokens
    text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_result(task.directory / "result.json", text)
    return tally


def _report(tallies: Sequence[Tally], tasks: Sequence[_Task], settings: JudgeConfig) -> None:
    """The table, one sentence per comparison, and the tokens used."""
    console = Console(highlight=False)
    names = [(task.comparison.a, task.comparison.b) for task in tasks]
    lines = []
    for (a, b), tally in zip(names, tallies, strict=True):
        lines.append(tally.summary(a, b))
        if tally.disagreed:
            reason = "the verdict flipped when the answers were swapped"
            lines.append(f"  {tally.disagreed} of {tally.ties} ties: {reason}")
    if settings.kind == "api":
        inputs, outputs = (sum(task.store.used_tokens[side] for task in tasks) for side in (0, 1))
        cost = _cost(inputs, outputs, settings)
        tokens = f"{inputs:,} input and {outputs:,} output tokens, earlier runs included"
        lines.append(tokens if cost is None else f"{tokens}: {cost:.4g}")
    lines += [f"results: {task.directory}" for task in tasks]
    console.print(result_table(names, tallies))
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def _check_enough(tallies: Sequence[Tally], tasks: Sequence[_Task]) -> None:
    """Nearly every prompt of each comparison has a verdict.

    Raises:
        DataError: lists the comparisons with too many unjudged prompts.
    """
    remedy = "see the notes there; the same command asks these questions again"
    problems = [
        Problem(
            str(task.directory / "verdicts.jsonl"),
            f"{tally.unjudged} of {tally.prompts} prompts have no verdict",
            remedy,
        )
        for tally, task in zip(tallies, tasks, strict=True)
        if not tally.is_enough
    ]
    if problems:
        raise DataError.of(problems)
