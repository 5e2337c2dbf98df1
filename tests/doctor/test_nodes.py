"""`doctor --nodes`: what it finds out about the machines of a run together."""

import json
import os
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_idpo.config.load import load_config
from megatron_idpo.doctor.finding import State
from megatron_idpo.doctor.nodes import check_nodes
from megatron_idpo.mcore.watchdog.launch_notes import VARIABLE, Launch


def check(
    file: str,
    *,
    is_shared: bool = True,
    versions: tuple[str, str] = ("1.0", "1.0"),
    ahead_s: float = 0.0,
    most_machines: int = 2,
) -> list[Any]:
    """The findings of this rank; rank 1 is another machine, perhaps with other files and clock."""
    import torch.distributed as dist

    launch = Launch("a", 0, "", fewest=2, most=most_machines)
    variables = {VARIABLE: json.dumps(asdict(launch))}

    is_second = dist.get_rank() == 1
    exists = Path.exists

    def marker_exists(path: Path, **options: Any) -> bool:
        is_hidden = "doctor" in path.name and is_second and not is_shared
        return not is_hidden and exists(path, **options)

    def clock_s() -> float:
        return time.time() + (ahead_s if is_second else 0.0)

    with (
        mock.patch("megatron_idpo.doctor.nodes._ALL_REDUCE_BYTES", 4096),
        mock.patch.dict(os.environ, variables),
        mock.patch("megatron_idpo.doctor.nodes._clock_s", clock_s),
        mock.patch("socket.gethostname", lambda: "ab"[is_second]),
        mock.patch("megatron_idpo.doctor.nodes.version", lambda name: versions[is_second]),
        mock.patch("megatron_idpo.mcore.watchdog.link.own_addresses", lambda: ["10.0.0.1"]),
        mock.patch.object(Path, "exists", marker_exists),
    ):
        return check_nodes(load_config(Path(file), required=("training",)))


@pytest.mark.distributed
def test_machines_that_work_together(workers, tmp_path):
    (tmp_path / "run.yaml").write_text(f"training: {{output: {tmp_path}/runs/x}}\n")
    first, second = workers.run(check, 2, str(tmp_path / "run.yaml"), most_machines=4, ahead_s=5.0)
    assert {finding.state for finding in first} == {State.OK}
    values = {finding.name: finding.value for finding in first}
    assert "2 processes on 2 machines (a, b)" in values["rendezvous"]
    assert values["network"] == "a 10.0.0.1, b 10.0.0.1"
    assert "torch 1.0" in values["versions"] and "GB/s" in values["all-reduce"]
    difference_s = float(re.match(r"differ by (\S+) s", values["clocks"])[1])
    assert difference_s == pytest.approx(5.0, abs=1.0)
    assert "as a save does" in values["gloo"]
    assert values["training.output"] == f"{tmp_path} is the same everywhere"
    assert [finding.name for finding in second] == [finding.name for finding in first]
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"], "the marker is deleted"


@pytest.mark.distributed
def test_machines_with_other_files_and_libraries(workers, tmp_path):
    (tmp_path / "run.yaml").write_text(f"training: {{output: {tmp_path}/runs/x}}\n")
    first, _ = workers.run(
        check, 2, str(tmp_path / "run.yaml"), is_shared=False, versions=("1.0", "2.0")
    )
    broken = {finding.name: finding for finding in first if finding.state is State.BROKEN}
    assert set(broken) == {"versions", "training.output"}
    assert "a: megatron-idpo" in broken["versions"].value
    assert broken["training.output"].value == f"{tmp_path} is another directory on b"
    assert "all machines share" in broken["training.output"].remedy


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ahead_s", "most_machines", "state", "value"),
    [
        (3600.0, 4, State.BROKEN, r"a is (3600|3599|3601)\.\d\d s \(± \d\.\d\d s\) behind b"),
        (-60.0, 2, State.NOTE, r"b is (59|60|61)\.\d\d s .* behind a"),
    ],
)
def test_clocks_that_differ_stop_elastic_runs_only(
    ahead_s, most_machines, state, value, workers, tmp_path
):
    (tmp_path / "run.yaml").write_text(f"training: {{output: {tmp_path}/runs/x}}\n")
    options = {"ahead_s": ahead_s, "most_machines": most_machines}
    for findings in workers.run(check, 2, str(tmp_path / "run.yaml"), **options):
        (clocks,) = (finding for finding in findings if finding.name == "clocks")
        assert clocks.state is state
        assert re.match(value, clocks.value), clocks.value
        assert "NTP" in clocks.remedy and "--master-addr" in clocks.consequence


def test_a_single_process_is_explained(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    (finding,) = check_nodes(None)
    assert finding.state is State.BROKEN and "--nnodes 2" in finding.remedy
