"""launch/slurm.sh with a fake Slurm: the commands it starts, exit codes and requeueing.

`scontrol` and `srun` are fakes on PATH; both machines are this one.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_idpo.errors import EXIT_PREEMPTED, EXIT_USER_ERROR

from .commands import LAUNCH, ROOT, check_command

SLURM = LAUNCH / "slurm.sh"
EXAMPLE = "examples/llama3_70b.yaml"
JOB_ID = "4711"
PORT = "24711"  # 20000 + the job's number modulo 10000


class Slurm:
    """A fake cluster of two machines, with the programs `scontrol` and `srun`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls = root / "calls"
        self.bin = root / "bin"
        self.bin.mkdir()
        self.program(
            "scontrol",
            f'echo "scontrol $*" >>{self.calls}\n[ "$2" != hostnames ] || printf "one\\ntwo\\n"',
        )
        self.program(
            "srun",
            f'echo "srun $*" >>{self.calls}\nwhile [ "$1" != bash ]; do shift; done\n'
            'pids=""; code=0\n'
            'for rank in 0 1; do SLURM_NODEID=$rank "$@" & pids="$pids $!"; done\n'
            f"echo $pids >{root}/pids\n"
            'for pid in $pids; do wait "$pid"; c=$?; [ $c -le $code ] || code=$c; done\nexit $code',
        )
        self.env = os.environ | {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "SLURM_JOB_ID": JOB_ID,
            "SLURM_JOB_NODELIST": "machine[1-2]",
            "SLURM_SUBMIT_DIR": str(ROOT),
        }

    def program(self, name: str, body: str) -> Path:
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
        return path

    def sbatch(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SLURM, *arguments],
            env=self.env | settings,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def has_requeued(self) -> bool:
        return f"scontrol requeue {JOB_ID}" in self.calls.read_text().splitlines()


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_reports_nothing(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    process = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert os.access(script, os.X_OK)


def test_dry_run_prints_the_command_of_every_machine(slurm: Slurm) -> None:
    process = slurm.sbatch(EXAMPLE, "training.output=a b", DRY_RUN="1")
    assert (process.returncode, process.stderr) == (0, "")
    lines = process.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["one", "two"]
    for rank, line in enumerate(lines):
        words = shlex.split(line.split(": ", 1)[1])
        check_command(words, nodes=2, rank=rank)
        assert words[-1] == "training.output=a b"
        assert words[words.index("--master-addr") + 1] == "one"
        assert words[words.index("--master-port") + 1] == PORT
    assert "srun" not in slurm.calls.read_text()


def test_run_starts_the_commands_of_the_dry_run(slurm: Slurm) -> None:
    python = slurm.program("python_fake", f'printf "%s\\n" "$0 $*" >>{slurm.root}/started')
    printed = slurm.sbatch(EXAMPLE, DRY_RUN="1", PYTHON=str(python)).stdout.splitlines()
    assert slurm.sbatch(EXAMPLE, PYTHON=str(python)).returncode == 0
    started = (slurm.root / "started").read_text().splitlines()
    assert sorted(started) == sorted(line.split(": ", 1)[1] for line in printed)


@pytest.mark.parametrize(
    ("codes", "restarts", "code", "requeues"),
    [
        ((0, 0), 0, 0, False),
        ((EXIT_PREEMPTED, EXIT_PREEMPTED), 0, EXIT_PREEMPTED, True),
        ((EXIT_PREEMPTED, EXIT_PREEMPTED), 100, EXIT_PREEMPTED, False),
        ((EXIT_USER_ERROR, EXIT_USER_ERROR), 0, EXIT_USER_ERROR, False),
        ((1, 0), 0, 1, False),
        ((EXIT_PREEMPTED, 137), 0, 137, False),
    ],
)
def test_only_a_stopped_and_saved_run_is_queued_again(
    slurm: Slurm, codes: tuple[int, int], restarts: int, code: int, requeues: bool
) -> None:
    python = slurm.program("python_fake", f'c=({codes[0]} {codes[1]}); exit "${{c[SLURM_NODEID]}}"')
    process = slurm.sbatch(EXAMPLE, PYTHON=str(python), SLURM_RESTART_COUNT=str(restarts))
    assert (process.returncode, slurm.has_requeued()) == (code, requeues)
    assert ("saved" in process.stderr) == (code == EXIT_PREEMPTED)


def test_task_that_ends_does_not_kill_tasks_that_still_save(slurm: Slurm) -> None:
    """srun would report the kill instead of the first exit code."""
    slurm.sbatch(EXAMPLE, PYTHON=str(slurm.program("python_fake", "exit 0")))
    (srun,) = (line for line in slurm.calls.read_text().splitlines() if line.startswith("srun"))
    assert "--kill-on-bad-exit=0" in srun and re.search(r"--wait [1-9]", srun)
    assert "bash -c exec " in srun  # Slurm signals a task's first process only


def test_sbatch_options_that_the_script_depends_on() -> None:
    options = re.findall(r"^#SBATCH (--[\w-]+)(?:=(\S+))?$", SLURM.read_text(), re.M)
    requested = dict(options)
    assert len(requested) == len(options) == SLURM.read_text().count("#SBATCH --")
    assert requested["--signal"].startswith("USR1@")  # to the tasks; `B:` would be to this script
    assert "--requeue" in requested and requested["--ntasks-per-node"] == "1"
    assert requested["--open-mode"] == "append"  # a requeued job would truncate its log


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((), {}, "usage: sbatch"),
        ((EXAMPLE,), {"SLURM_JOB_NODELIST": ""}, "start this with sbatch"),
        (("missing.yaml",), {}, "missing.yaml does not exist"),
        ((EXAMPLE,), {"PYTHON": "no_python"}, "no_python does not exist"),
        ((EXAMPLE,), {"SLURM_SUBMIT_DIR": str(ROOT / "tests")}, "submit from the checkout"),
    ],
)
def test_missing_file_or_setting_is_reported(
    slurm: Slurm, arguments: tuple[str, ...], settings: dict[str, str], message: str
) -> None:
    process = slurm.sbatch(*arguments, **settings)
    assert (process.returncode, message in process.stderr) == (EXIT_USER_ERROR, True), (
        process.stderr
    )


def test_files_named_in_the_readme_exist() -> None:
    text = (LAUNCH / "README.md").read_text()
    named = set(re.findall(r"\b(?:launch|examples|tests)/[\w./]*\w", text))
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
