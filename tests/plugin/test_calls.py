"""What is remembered of the results of an attached model."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_idpo.errors import ConfigError
from megatron_idpo.plugin.calls import CallChecks
from megatron_idpo.plugin.preference_batch import PreferenceBatch
from megatron_idpo.plugin.targets import Targets


def batch(seed: int) -> PreferenceBatch:
    tokens_BS = torch.arange(8).view(2, 4) + seed
    return PreferenceBatch(
        Targets.from_mask(tokens_BS, torch.tensor([[False, False, True, True]] * 2))
    )


def checks() -> CallChecks:
    nothing: Any = None
    return CallChecks(nothing, nothing, nothing)


def test_remembered_results_keep_no_micro_batch_in_memory():
    own = checks()
    first, logps_2P = batch(0), torch.zeros(2)
    own.remember(logps_2P, first)
    alive = weakref.ref(first.targets)
    del first
    gc.collect()
    assert alive() is None
    own.check_result(logps_2P, batch(0))
    with pytest.raises(ConfigError, match="the output of another micro-batch"):
        own.check_result(logps_2P, batch(1))


def test_targets_without_a_digest_are_known_by_identity():
    own = checks()
    first, second = (
        replace(one, targets=replace(one.targets, digest=None)) for one in (batch(0), batch(0))
    )
    logps_2P = torch.zeros(2)
    own.remember(logps_2P, first)
    own.check_result(logps_2P, first)
    with pytest.raises(ConfigError, match="the output of another micro-batch"):
        own.check_result(logps_2P, second)
