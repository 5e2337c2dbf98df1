"""Outputs of the layers of one pipeline stage: counted, summed for the log, and collected.

A training script that leaves out a chunk, mixes up its micro-batches or miscounts pairs gets wrong
gradients without an error from megatron-core. `OutputRecorder` counts every output and compares the
counts when the step's gradients are finished (`step_checks.py`). It keeps sums, and outputs only
while the script collects them.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_idpo.errors import ConfigError, Problem
from megatron_idpo.objective.dpo import Objective, layer_metrics
from megatron_idpo.plugin.preference_batch import PreferenceBatch
from megatron_idpo.plugin.step_checks import StepView, check_over_ranks, check_stated_pairs
from megatron_idpo.plugin.targets import Targets

SUMMED = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
"""Metrics of a pair (`layer_metrics`) whose sums are kept, followed by the number of pairs."""

_RUN_ALL = (
    "run every micro-batch through every chunk with AttachedDpo.forward, or with "
    "AttachedDpo.model_kwargs in the call, and backward too unless under torch.no_grad; "
    "pass AttachedDpo.loss to the schedule as its loss function"
)

OTHER_TOKENS_REMEDY = "pass the tokens that the targets were built from"


@dataclass(frozen=True, slots=True)
class LayerOutput:
    """Log-probabilities and loss of one micro-batch at one layer."""

    layer: int
    """Counted from 1; the model's number of layers is the final one."""

    micro_batch: int
    """`PreferenceBatch.index`."""

    logps_2P: Tensor
    """Log-probabilities of the policy by answer, float32, detached."""

    reference_logps_2P: Tensor | None
    """The reference's, if the micro-batch has them."""

    loss_P: Tensor | None
    """The layer's own loss of each pair (Eq. 1), unweighted, detached; None without a reference."""

    lengths_2P: Tensor | None = None
    """Response tokens of each answer, float32; None without a loss."""

    def sums(self, objective: Objective) -> Tensor:
        """Sum of each metric over the pairs, and the number of pairs: `[len(SUMMED) + 1]`."""
        assert self.loss_P is not None and self.lengths_2P is not None
        metrics = layer_metrics(
            self.loss_P, self.logps_2P, self.reference_logps_2P, self.lengths_2P, objective
        )
        pairs_P = torch.ones_like(self.loss_P)
        return torch.stack([*(metrics[name].sum() for name in SUMMED), pairs_P.sum()]).double()


@dataclass(slots=True)
class _Totals:
    """What is kept of one step, or of one evaluation."""

    counts: dict[int, Counter[int]] = field(default_factory=dict)
    """By layer: outputs per micro-batch."""

    sums: dict[int, Tensor] = field(default_factory=dict)
    """By layer: `LayerOutput.sums`."""

    num_micro_batches: set[int] = field(default_factory=set)
    global_pairs: set[int] = field(default_factory=set)
    trained_pairs: int = 0
    calls: dict[int, list[int | Tensor]] = field(default_factory=dict)
    """By index of the chunk: a digest of the micro-batch of each call."""

    def add(self, output: LayerOutput, objective: Objective) -> None:
        self.counts.setdefault(output.layer, Counter())[output.micro_batch] += 1
        if output.loss_P is not None:
            sums = output.sums(objective)
            previous = self.sums.get(output.layer)
            self.sums[output.layer] = sums if previous is None else previous + sums


class OutputRecorder:
    """The outputs of one rank's layers in the current step, and since the last one."""

    def __init__(
        self,
        layers: Sequence[int],
        final: int,
        objective: Objective,
        *,
        counts_pairs: bool,
        has_all_pairs: bool = False,
        batch_groups: Sequence[Sequence[int]] = (),
    ) -> None:
        """Nothing recorded yet.

        Args:
            layers: this rank's layers, tapped or final, with one output per micro-batch.
            final: the final layer.
            objective: of the metrics.
            counts_pairs: whether this rank adds the final layer's pairs to the global count, so
                that no pair counts twice.
            has_all_pairs: whether there is one data-parallel rank.
            batch_groups: `ModelGroups.batch_groups`.
        """
        self._layers = list(layers)
        self._final = final
        self._objective = objective
        self._counts_pairs = counts_pairs
        self._has_all_pairs = has_all_pairs
        self._batch_groups = tuple(tuple(group) for group in batch_groups)
        self._step = _Totals()
        self._evaluation = _Totals()
        self._mismatches: Tensor | None = None
        self._collectors: list[list[LayerOutput]] = []

    def record(self, output: LayerOutput, batch: PreferenceBatch, *, trains: bool) -> None:
        """Record the output of a layer.

        Args:
            output: of the layer.
            batch: that it is of.
            trains: whether its loss enters the gradient of the current step.

        Raises:
            ConfigError: in training, the batch lacks its counts, or the step has an output too
                many.
        """
        if trains:
            self._check_counts(output.layer, batch)
        totals = self._step if trains else self._evaluation
        totals.add(output, self._objective)
        if trains:
            totals.num_micro_batches.add(batch.num_micro_batches)
            totals.global_pairs.add(batch.global_pairs)
            if output.layer == self._final:
                totals.trained_pairs += batch.num_pairs
        for collected in self._collectors:
            collected.append(output)

    def _check_counts(self, layer: int, batch: PreferenceBatch) -> None:
        for name in ("num_micro_batches", "global_pairs"):
            count = getattr(batch, name)
            if count < 1:
                raise ConfigError.at(
                    f"PreferenceBatch.{name}",
                    f"is {count} in training",
                    "set num_micro_batches to the micro-batches that this rank runs in the step, "
                    "and global_pairs to the pairs of all data-parallel ranks",
                )
        recorded = self._step.counts.get(layer, Counter())
        if recorded.total() >= batch.num_micro_batches:
            raise ConfigError.at(
                f"layer {layer}",
                f"has more than {batch.num_micro_batches} outputs since gradients were finished",
                "set TransformerConfig.finalize_model_grads_func to "
                "AttachedDpo.finalize_model_grads, and PreferenceBatch.num_micro_batches to the "
                "schedule's num_microbatches; if they are, an earlier step was not finished: call "
                "AttachedDpo.discard_step where an exception ends a step, and evaluate under "
                "torch.no_grad",
            )

    def add_call(self, chunk: int, targets: Targets) -> None:
        """Record that a chunk is called in training, with the micro-batch of these targets."""
        self._step.calls.setdefault(chunk, []).append(targets.current_digest())

    def discard_step(self) -> None:
        """Forget a step that failed."""
        self._step = _Totals()
        self._mismatches = None

    def finish_step(self, gather: Callable[[Any], list[Any]] | None = None) -> dict[int, Tensor]:
        """The sums of the step's outputs by layer. The next output begins a new step.

        Args:
            gather: returns the values of all ranks of the model (`ModelGroups.gather`). Then their
                micro-batches and number of pairs are compared as well, and every rank raises.
                Collective. None: only this rank's outputs are checked, which shows a wrong number
                of pairs if there is one data-parallel rank.

        Raises:
            ConfigError: a layer does not have exactly one output per micro-batch, the model was
                called with other tokens than a batch's, ranks of one data-parallel rank got
                different micro-batches, or the losses were averaged over another number of pairs
                than the step had.
        """
        step, self._step, self._evaluation = self._step, _Totals(), _Totals()
        problems = self._count_problems(step.counts, step.num_micro_batches)
        problems += self._take_mismatches()
        if not problems and self._final in self._layers:
            problems += check_stated_pairs(
                step.global_pairs, step.trained_pairs, has_all_pairs=self._has_all_pairs
            )
        if gather is not None:
            view = StepView(
                problems=problems,
                pairs=step.trained_pairs if self._counts_pairs else 0,
                stated_pairs=sorted(step.global_pairs),
                batch_groups=self._batch_groups,
                calls=[[int(one) for one in calls] for calls in step.calls.values()],
            )
            problems = check_over_ranks(gather(view))
        if problems:
            raise ConfigError.of(problems)
        return step.sums

    def take_evaluation(self) -> dict[int, Tensor]:
        """The sums of outputs without a gradient, by layer, since the last step or call.

        Raises:
            ConfigError: the model was called with other tokens than a batch's.
        """
        evaluation, self._evaluation = self._evaluation, _Totals()
        if problems := self._take_mismatches():
            raise ConfigError.of(problems)
        return evaluation.sums

    def add_mismatches(self, count: Tensor) -> None:
        """Count response tokens that the model was not called with; read once per step.

        Args:
            count: int64 `[]` (`Targets.count_mismatches`); stays on its device.
        """
        self._mismatches = count if self._mismatches is None else self._mismatches + count

    def _take_mismatches(self) -> list[Problem]:
        """Reads the count, which waits for a GPU."""
        mismatches, self._mismatches = self._mismatches, None
        if mismatches is None or not (count := int(mismatches)):
            return []
        message = f"{count} response tokens are not in the tokens that the model was called with"
        return [Problem("micro-batches", message, OTHER_TOKENS_REMEDY)]

    @contextmanager
    def collect(self, num_micro_batches: int | None) -> Iterator[list[LayerOutput]]:
        """All outputs that are recorded in the block.

        Raises:
            ConfigError: at the end, if a layer does not have exactly one output per micro-batch, or
                the model was called with other tokens than a batch's.
        """
        collected: list[LayerOutput] = []
        self._collectors.append(collected)
        try:
            yield collected
        finally:
            # By identity: two collectors may have equal outputs.
            self._collectors = [other for other in self._collectors if other is not collected]
        counts: dict[int, Counter[int]] = {}
        for output in collected:
            counts.setdefault(output.layer, Counter())[output.micro_batch] += 1
        expected = set() if num_micro_batches is None else {num_micro_batches}
        if problems := self._count_problems(counts, expected) + self._take_mismatches():
            raise ConfigError.of(problems)

    def _count_problems(
        self, counts: dict[int, Counter[int]], num_micro_batches: set[int]
    ) -> list[Problem]:
        """Layers without one output per micro-batch."""
        own = {layer: counts.get(layer, Counter()) for layer in self._layers}
        numbers = {count.total() for count in own.values()}
        expected = num_micro_batches or numbers
        if len(expected) > 1 and num_micro_batches:
            message = f"is {' and '.join(map(str, sorted(expected)))} in one step"
            remedy = "set it to the schedule's num_microbatches"
            return [Problem("PreferenceBatch.num_micro_batches", message, remedy)]
        most = max(expected, default=0)
        problems = [
            Problem(
                f"layer {layer}", f"has {count.total()} outputs for {most} micro-batches", _RUN_ALL
            )
            for layer, count in own.items()
            if count.total() != most
        ]
        if not problems and len({frozenset(count.items()) for count in own.values()}) > 1:
            message = f"this rank's layers {self._layers} received different micro-batches"
            remedy = "give every model chunk its own iterator over the same micro-batches"
            problems.append(Problem("data_iterator", message, remedy))
        return problems
