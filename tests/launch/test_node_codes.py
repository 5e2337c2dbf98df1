"""launch/node.py: its exit code when torchrun itself fails, and where it writes the code."""

from typing import Any
from unittest.mock import Mock

import pytest
from torch.distributed import DistStoreError
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.launcher import api as launcher

from megatron_idpo.errors import EXIT_PREEMPTED

from .commands import load_script

node = load_script("node")


@pytest.fixture
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> Any:
    """In place of torchrun; what node.py changes for it is restored."""
    monkeypatch.setattr(launcher, "LocalElasticAgent", LocalElasticAgent)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    torchrun = Mock()
    monkeypatch.setattr(node, "torchrun", torchrun)
    return torchrun


def test_machines_that_do_not_come_are_no_failure(no_torchrun, capsys) -> None:
    no_torchrun.side_effect = DistStoreError(
        "Timed out after 601 seconds waiting for clients. 1/2 clients joined."
    )
    assert node.main([]) == EXIT_PREEMPTED
    assert "1 of 2 machines have come" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "written"), [(0, False), (75, False), (2, True), (137, True)])
def test_code_of_a_failure_is_written_for_schedulers(
    tmp_path, monkeypatch, code: int, written: bool
) -> None:
    file = tmp_path / "slurm-1.codes" / "0"
    monkeypatch.setenv(node.EXIT_CODE_FILE, str(file))
    monkeypatch.setattr(node, "_run", lambda *_: code)
    assert node.main([]) == code
    assert (file.read_text() if file.exists() else "") == (f"{code}\n" if written else "")
