"""Calls of an attached model: what travels through it, and checks before and after.

S  positions   B  batch   A  values that the model returns, a multiple of the answers
"""

import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_idpo.errors import ConfigError, DataError
from megatron_idpo.mcore.model.chunk import ModelChunk
from megatron_idpo.mcore.parallel.groups import ModelGroups
from megatron_idpo.plugin.compatibility import check_rows, check_sharding
from megatron_idpo.plugin.outputs import OTHER_TOKENS_REMEDY, OutputRecorder
from megatron_idpo.plugin.preference_batch import PreferenceBatch
from megatron_idpo.plugin.targets import Targets

_REMEMBERED_CALLS = 256
"""Far more than a schedule has between a call on the last stage and its loss, which is none. A
result is a few floats."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """What travels through one model in one call."""

    owner: object
    """The `AttachedDpo` whose `model_kwargs` made it."""

    batch: PreferenceBatch
    targets: Targets
    """Of this context-parallel rank's positions."""


@dataclass(frozen=True, slots=True)
class _Returned:
    """A result of the output layer."""

    logps_A: Tensor
    version: int
    targets: weakref.ref[Targets]
    """Weak: targets share the memory of a whole row, and evaluations remember many rows."""

    digest: int | None
    """Of the targets."""

    def is_of(self, targets: Targets) -> bool:
        """Whether the model was called with these targets, or equal ones."""
        is_equal = self.digest is not None and self.digest == targets.digest
        return is_equal or self.targets() is targets


class CallChecks:
    """What a wrong call, or a wrong use of its result, can be recognized by."""

    def __init__(self, owner: object, groups: ModelGroups, outputs: OutputRecorder) -> None:
        """Nothing called yet.

        Args:
            owner: the `AttachedDpo`.
            groups: of the model.
            outputs: of the model; counts tokens of other batches.
        """
        self._owner = owner
        self._groups = groups
        self._outputs = outputs
        self._checked_chunks: set[int] = set()
        self._returned: deque[_Returned] = deque(maxlen=_REMEMBERED_CALLS)

    def begin(
        self, chunk: ModelChunk, call: Call, packed_seq_params: Any, tokens_BS: Tensor | None
    ) -> None:
        """Check a call before it runs. Later stages may get no tokens.

        Raises:
            ConfigError: the batch of another attached model, a row for attention that would ignore
                its structure, or parameters that are sharded.
            DataError: the tokens of another batch.
        """
        if call.owner is not self._owner:
            message = "has the batch of another attached model"
            raise ConfigError.at("packed_seq_params", message, "use this model's model_kwargs")
        problems = check_rows(chunk, packed_seq_params)
        if id(chunk) not in self._checked_chunks:
            problems += check_sharding(chunk)
        if problems:
            raise ConfigError.of(problems)
        self._checked_chunks.add(id(chunk))
        if tokens_BS is None:
            return
        num_rows, num_positions = call.targets.shape
        expected = (num_rows, num_positions // self._groups.context.size())
        if tuple(tokens_BS.shape) != expected:
            message = (
                f"tokens of shape {tuple(tokens_BS.shape)} for targets of {list(expected)} tokens"
            )
            raise DataError.at(f"micro-batch {call.batch.index}", message, OTHER_TOKENS_REMEDY)
        self._compare_tokens(call.batch, tokens_BS)

    def _compare_tokens(self, batch: PreferenceBatch, tokens_BS: Tensor) -> None:
        """Check that the model gets the tokens that its batch was built from."""
        groups = self._groups
        count = batch.targets.count_mismatches(
            tokens_BS, groups.context_rank, groups.context.size()
        )
        if count is None:
            return
        if count.device.type != "cpu":
            self._outputs.add_mismatches(count)  # reading it would wait for the GPU
        elif count:
            message = f"{int(count)} response tokens are not in the tokens of the model's call"
            raise DataError.at(f"micro-batch {batch.index}", message, OTHER_TOKENS_REMEDY)

    def remember(self, logps_A: Tensor, batch: PreferenceBatch) -> None:
        """Remember what the output layer returns, and of which batch it is."""
        targets = batch.targets
        self._returned.append(
            _Returned(logps_A.detach(), _version(logps_A), weakref.ref(targets), targets.digest)
        )

    def check_result(self, logps_A: Tensor, batch: PreferenceBatch) -> None:
        """Check what the script gives to the loss: a result of this batch, and unchanged.

        A subclass or a hook that scales logits after the output layer has scaled log-probabilities
        instead, and no tap's.

        Raises:
            ConfigError: it is another one.
        """
        if not logps_A.numel():
            return
        # Memory that is remembered is not freed, so that no other tensor has its address. Views
        # have it too.
        address = logps_A.untyped_storage().data_ptr()
        for returned in reversed(self._returned):
            if returned.logps_A.untyped_storage().data_ptr() != address:
                continue
            is_same = logps_A.data_ptr() == returned.logps_A.data_ptr()
            if _version(logps_A) != returned.version or not is_same:
                break
            if returned.is_of(batch.targets):
                return
            message = f"the output of another micro-batch for micro-batch {batch.index}"
            remedy = "give the loss the batch whose model_kwargs the model was called with"
            raise ConfigError.at("AttachedDpo.loss", message, remedy)
        message = "an output that was changed after the output layer returned it"
        remedy = (
            "pass what the model returned; a subclass or hook that changes logits would change "
            "log-probabilities of the final layer only"
        )
        raise ConfigError.at("AttachedDpo.loss", message, remedy)

    def forget_results(self) -> None:
        """Free what `remember` keeps."""
        self._returned.clear()


def _version(tensor: Tensor) -> int:
    """Counts changes in place; those of inference mode are not counted."""
    return 0 if tensor.is_inference() else tensor._version
