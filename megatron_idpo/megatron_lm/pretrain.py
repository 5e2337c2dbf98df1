"""`PretrainDpo`: what Megatron-LM's `pretrain()` is given to train with intermediate DPO.

dpo = PretrainDpo(args, pairs=pairs, layers=[22], objective=Objective(), vocab_size=32000,
                  cache=Path("reference"))
model_config.pre_wrap_hooks.append(dpo.pre_wrap_hook)
pretrain(config, dpo.data_provider, ModelType.encoder_or_decoder, dpo.forward_step,
         non_loss_data_func=dpo.report_evaluation)

P  pairs   L  layers   2 = chosen, rejected
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_idpo.data.pairs import PairSource
from megatron_idpo.errors import ConfigError, Problem
from megatron_idpo.mcore.cpu.redirect import default_device
from megatron_idpo.mcore.parallel.groups import ModelGroups, data_parallel_size, rank_coordinates
from megatron_idpo.mcore.parallel.pipeline import run_schedule
from megatron_idpo.megatron_lm.arguments import check_arguments
from megatron_idpo.megatron_lm.padded import (
    Order,
    check_lengths,
    padded,
    steps_in_order,
    training_steps,
)
from megatron_idpo.megatron_lm.reference import (
    data_identity,
    reference_logps,
    score,
    weights_identity,
)
from megatron_idpo.objective.dpo import Objective
from megatron_idpo.objective.layers import LayerSpec
from megatron_idpo.plugin.attach import AttachedDpo, attach
from megatron_idpo.plugin.outputs import LayerOutput
from megatron_idpo.plugin.preference_batch import PreferenceBatch
from megatron_idpo.plugin.step_log import FINAL_LOSS, LOSS
from megatron_idpo.reference.fingerprint import Fingerprint
from megatron_idpo.reference.logps_table import Logps

EVAL = "eval"
"""Subdirectory of the cache with the evaluation pairs, as in caches of `score`."""


class MicroBatch(NamedTuple):
    """What an iterator yields."""

    tokens_BS: Tensor
    position_ids_BS: Tensor
    batch: PreferenceBatch


class PretrainDpo:
    """Intermediate DPO for one call of `megatron.training.pretrain`.

    A sample of Megatron-LM is one answer, so `--micro-batch-size 4` is two pairs.
    """

    def __init__(
        self,
        args: Any,
        *,
        pairs: PairSource,
        layers: LayerSpec,
        objective: Objective,
        vocab_size: int,
        cache: Path | None,
        eval_pairs: PairSource | None = None,
        reference: Logps | None = None,
        adapters_off: Callable[[], AbstractContextManager[None]] | None = None,
        use_norm: bool = True,
    ) -> None:
        """Check the arguments; nothing is attached yet.

        Args:
            args: Megatron-LM's, validated.
            pairs: to train on (`load_pairs`).
            layers: the tapped layers, as `attach` takes them.
            objective: the loss.
            vocab_size: tokens of the vocabulary, without padding rows.
            cache: directory for the reference's log-probabilities; one of `score` for the same
                pairs is used as it is.
            eval_pairs: for --eval-interval. Every evaluation has the first `--eval-iters` batches.
            reference: instead of a cache, the final layer's log-probabilities of the training
                pairs, float32 [P, 2]: TRL's columns `ref_chosen_logps` and `ref_rejected_logps`.
                Only if no layer is tapped, or `objective.reference_layer` is "final".
            adapters_off: switches the adapters off within its block (`Adapters.disabled`). The rest
                of the model, which must be frozen, is then the reference at every iteration, and
                `cache` may be None: pairs are scored at each start.
            use_norm: read tapped layers through the final norm.

        Raises:
            ConfigError: naming Megatron-LM's arguments that do not fit, or the loss `sft`, which is
                a mean over the tokens of a global batch.
            DataError: pairs longer than --seq-length.
        """
        problems = check_arguments(
            args,
            has_cache=cache is not None,
            has_eval_pairs=eval_pairs is not None,
            has_reference=reference is not None,
            has_adapters=adapters_off is not None,
        )
        if objective.uses("sft"):
            message = (
                "sft is a mean over the chosen tokens of a global batch, which are not counted"
            )
            remedy = "set Objective.nll_weight instead: a mean over the tokens of each answer"
            problems.append(Problem("objective.loss", message, remedy))
        if problems:
            raise ConfigError.of(problems)
        for source in filter(None, (pairs, eval_pairs)):
            check_lengths(source, args.seq_length)
        self._args = args
        self._pairs, self._eval_pairs = pairs, eval_pairs
        self._attach = partial(
            attach, layers=layers, objective=objective, vocab_size=vocab_size, use_norm=use_norm
        )
        self._vocab_size, self._use_norm = vocab_size, use_norm
        self._cache, self._given, self._adapters_off = cache, reference, adapters_off
        self._tables: dict[bool, Logps] = {}
        self._chunks: Sequence[Any] = ()
        self._dpo: AttachedDpo | None = None

    @property
    def dpo(self) -> AttachedDpo:
        """The attached model.

        Raises:
            ConfigError: the model was built without `pre_wrap_hook`.
        """
        if self._dpo is None:
            remedy = "append it to the model configuration's pre_wrap_hooks, before pretrain()"
            raise ConfigError.at("PretrainDpo.pre_wrap_hook", "was not called", remedy)
        return self._dpo

    # ---- called by pretrain() -------------------------------------------------------------------

    def pre_wrap_hook(self, chunks: list[Any]) -> list[Any]:
        """Attach to the model's chunks, before DDP and before a checkpoint is loaded.

        Raises:
            ConfigError: see `attach`; `adapters_off` of a model without a frozen parameter.
        """
        is_trained = (p.requires_grad for chunk in chunks for p in chunk.parameters())
        if self._adapters_off is not None and all(is_trained):
            message = "is given, but nothing is frozen: the reference would be trained"
            remedy = "add adapters and freeze the rest in an earlier pre_wrap_hook"
            raise ConfigError.at("PretrainDpo.adapters_off", message, remedy)
        self._dpo = self._attach(chunks)
        self._chunks = chunks
        chunks[0].config.finalize_model_grads_func = self._dpo.finalize_model_grads
        return chunks

    def data_provider(
        self, num_samples: object, vp_stage: int | None = None
    ) -> tuple[Iterator[MicroBatch], Iterator[MicroBatch] | None, None]:
        """Iterators over micro-batches of training and evaluation. Collective at the first call.

        Args:
            num_samples: not used; the training pairs repeat in another order.
            vp_stage: not used; with interleaving `pretrain()` asks once for each chunk.

        Raises:
            CheckpointError: see `reference_logps`.
        """
        for is_eval in (False, True):
            if is_eval not in self._tables and (source := self._source(is_eval)) is not None:
                self._tables[is_eval] = self._reference(source, is_eval=is_eval)
        evaluation = self._evaluation() if self._eval_pairs is not None else None
        return self._training(), evaluation, None

    # Every rank reads its own data; Megatron-LM would ask the first tensor-parallel rank only.
    setattr(data_provider, "is_distributed", True)  # noqa: B010 - a function's attribute

    def forward_step(self, iterator: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
        """Megatron-LM's `forward_step_func`."""
        micro_batch = next(iterator)
        batch = micro_batch.batch.to(default_device())
        output = self.dpo.forward(
            model,
            batch,
            micro_batch.tokens_BS.to(default_device(), non_blocking=True),
            micro_batch.position_ids_BS.to(default_device(), non_blocking=True),
            None,  # causal; padding is at the end
        )
        return output, partial(self.dpo.loss, batch)

    def report_evaluation(self, model: object) -> dict[str, float]:
        """Print the means of all layers over an evaluation, on the last rank. Collective.

        Megatron-LM's `non_loss_data_func`; its own line has the final layer only.
        """
        figures = self.dpo.report_evaluation()
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            values = " | ".join(f"{name} value: {value:.6E}" for name, value in figures.items())
            print(f" evaluation of all layers | {values} |", flush=True)
        return figures

    def write_evaluation(self, figures: Mapping[str, float], iteration: int, writer: Any) -> None:
        """TensorBoard's curves of what Megatron-LM's evaluation lacks: combined loss and taps.

        Megatron-LM's `process_non_loss_data_func`, called on the last rank.

        Args:
            figures: of `report_evaluation`.
            iteration: of the training.
            writer: of TensorBoard.
        """
        for name, value in figures.items():
            if FINAL_LOSS in figures and (name == LOSS or name.startswith("layer ")):
                writer.add_scalar(f"{name} validation", value, iteration)

    # ---- micro-batches --------------------------------------------------------------------------

    def _order(self, *, is_eval: bool) -> Order:
        args = self._args
        samples, micro_batch = (
            (args.eval_global_batch_size, args.eval_micro_batch_size)
            if is_eval
            else (args.global_batch_size, args.micro_batch_size)
        )
        ranks = data_parallel_size()
        return Order(
            micro_batch // 2, samples // (micro_batch * ranks), rank_coordinates().dp_rank, ranks
        )

    def _training(self) -> Iterator[MicroBatch]:
        order = self._order(is_eval=False)
        steps = training_steps(
            order,
            len(self._pairs),
            consumed_pairs=self._args.consumed_train_samples // 2,
            seed=self._args.seed,
        )
        for step in steps:
            yield from self._micro_batches(
                step,
                self._tables[False],
                is_eval=False,
                num_micro_batches=order.num_micro_batches,
                global_pairs=order.global_pairs,
            )

    def _evaluation(self) -> Iterator[MicroBatch]:
        assert self._eval_pairs is not None
        order, num_steps = self._order(is_eval=True), self._args.eval_iters
        while True:
            for step in steps_in_order(order, len(self._eval_pairs), num_steps):
                yield from self._micro_batches(
                    step, self._tables[True], is_eval=True, global_pairs=order.global_pairs
                )

    def _micro_batches(
        self,
        step: Sequence[Sequence[int]],
        table_PL2: Logps | None,
        *,
        is_eval: bool,
        num_micro_batches: int = 0,
        global_pairs: int = 0,
    ) -> Iterator[MicroBatch]:
        source = self._source(is_eval)
        assert source is not None
        for index, at in enumerate(step):
            pairs = [source[pair] for pair in at]
            tokens, position_ids, targets = padded(pairs, self._args.seq_length)
            reference: dict[int, Tensor] = {}
            if table_PL2 is not None:
                for column, layer in enumerate(self._reference_layers):
                    reference[layer] = torch.from_numpy(table_PL2[list(at), column].reshape(-1))
            batch = PreferenceBatch(
                targets,
                reference_logps=reference,
                index=index,
                num_micro_batches=num_micro_batches,
                global_pairs=global_pairs,
            )
            yield MicroBatch(tokens, position_ids, batch)

    def _source(self, is_eval: bool) -> PairSource | None:
        return self._eval_pairs if is_eval else self._pairs

    # ---- reference ------------------------------------------------------------------------------

    @property
    def _reference_layers(self) -> tuple[int, ...]:
        """The layers at which the losses need the reference, ascending."""
        needs_taps = self.dpo.layers and not self.dpo.reads_final_reference
        return (*(sorted(self.dpo.layers) if needs_taps else ()), self.dpo.num_layers)

    def _reference(self, source: PairSource, *, is_eval: bool) -> Logps:
        if self._given is not None:
            return self._given_reference(len(source))
        args, layers, groups = self._args, self._reference_layers, ModelGroups.of()
        order = self._order(is_eval=is_eval)
        num_steps = -(-len(source) // order.global_pairs)

        def compute() -> Logps:
            return score(
                steps_in_order(order, len(source), num_steps),
                partial(self._score_step, is_eval=is_eval),
                num_pairs=len(source),
                step_pairs=order.global_pairs,
                layers=layers,
                groups=groups,
            )

        off = self._adapters_off
        with nullcontext() if off is None else off():
            if self._cache is None:
                return compute()
            return reference_logps(
                self._cache / EVAL if is_eval else self._cache,
                self._fingerprint(source),
                iteration=args.iteration if off is None else 0,
                compute=compute,
                weights_identity=lambda: weights_identity(
                    self._chunks, self._vocab_size, groups, only_frozen=off is not None
                ),
            )

    def _fingerprint(self, source: PairSource) -> Fingerprint:
        """What the cache must have been made from, but for the weights."""
        return Fingerprint(
            weights="",
            tokenizer="",
            chat_template="",
            data=data_identity(source),
            pairs=len(source),
            max_length=self._args.seq_length,
            truncation="",
            layers=self._reference_layers,
            norm="final" if self._use_norm else "none",
            dtype=str(self._args.params_dtype),
        )

    def _given_reference(self, num_pairs: int) -> Logps:
        assert self._given is not None
        if self._reference_layers != (self.dpo.num_layers,):
            message = "has the final layer only, but tapped layers have their own reference"
            remedy = "set Objective.reference_layer to 'final', or give a cache directory instead"
            raise ConfigError.at("reference", message, remedy)
        if self._given.shape != (num_pairs, 2):
            message = f"has shape {self._given.shape} for {num_pairs} pairs"
            raise ConfigError.at("reference", message, "give float32 [pairs, 2]: chosen, rejected")
        return np.ascontiguousarray(self._given[:, None], np.float32)

    def _score_step(self, step: Sequence[Sequence[int]], *, is_eval: bool) -> list[LayerOutput]:
        """The outputs of this rank's layers for its micro-batches. Collective over the pipeline."""
        micro_batches = list(self._micro_batches(step, None, is_eval=is_eval))
        with self.dpo.collect_outputs(len(step)) as outputs:
            run_schedule(
                self.forward_step,
                micro_batches,
                self._chunks,
                row_tokens=self._args.seq_length,
                micro_batch_size=2 * len(step[0]),
                training=False,
            )
        return outputs
