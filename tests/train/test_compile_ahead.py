"""What compiling before the first step leaves behind."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import torch

from megatron_idpo.data.packing.batches import RowSettings
from megatron_idpo.train import compile_ahead as module


def test_the_first_step_is_compared_over_the_ranks_after_compiling(monkeypatch):
    """The rows that are compiled are the same on all ranks; those of the first step may not be."""
    calls: list[str] = []
    monkeypatch.setattr(module, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(module, "run_batch", lambda *_, **__: calls.append("run"))
    policy: Any = SimpleNamespace(trainable=Mock(), dpo=Mock())
    policy.dpo.check_next_step = lambda: calls.append("check next")
    rows = RowSettings(row_tokens=64, pad_token=0, share_prompt=True, trim_tokens=32)
    assert module.compile_ahead(policy, rows) is not None
    assert calls[-1] == "check next" and calls.count("check next") == 1 and "run" in calls
