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

from megatron_idpo.errors import EXIT_PEER_LOST, EXIT_PREEMPTED, EXIT_USER_ERROR

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

    def checkout(self) -> Path:
        """A directory to submit from, where files of the job are kept, as is the log."""
        directory = self.root / "checkout"
        directory.mkdir()
        for name in ("launch", "examples"):
            (directory / name).symlink_to(ROOT / name)
        return directory

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
    ],
)
def test_only_a_stopped_and_saved_run_is_queued_again(
    slurm: Slurm, codes: tuple[int, int], restarts: int, code: int, requeues: bool
) -> None:
    python = slurm.program("python_fake", f'c=({codes[0]} {codes[1]}); exit "${{c[SLURM_NODEID]}}"')
    process = slurm.sbatch(EXAMPLE, PYTHON=str(python), SLURM_RESTART_COUNT=str(restarts))
    assert (process.returncode, slurm.has_requeued()) == (code, requeues)
    assert ("saved" in process.stderr) == (code == EXIT_PREEMPTED)


@pytest.mark.parametrize(
    ("codes", "settings", "code", "requeues"),
    [
        ((EXIT_PEER_LOST, EXIT_PEER_LOST), {}, EXIT_PEER_LOST, 3),  # a cut cable
        ((EXIT_PEER_LOST, 137), {}, 137, 3),  # a killed process
        ((EXIT_PEER_LOST, 0), {"MAX_RESTARTS": "1"}, EXIT_PEER_LOST, 1),
        ((EXIT_PEER_LOST, 0), {"MAX_RESTARTS": "0"}, EXIT_PEER_LOST, 0),
        ((130, 130), {}, 130, 0),  # Ctrl-C
    ],
)
def test_run_that_lost_a_process_is_queued_again_a_few_times(
    slurm: Slurm, codes: tuple[int, int], settings: dict[str, str], code: int, requeues: int
) -> None:
    python = slurm.program("python_fake", f'c=({codes[0]} {codes[1]}); exit "${{c[SLURM_NODEID]}}"')
    submitted_from = slurm.checkout()
    settings |= {"PYTHON": str(python), "SLURM_SUBMIT_DIR": str(submitted_from)}
    # Restarts of the day before do not count.
    (submitted_from / f"slurm-{JOB_ID}.restarts").write_text("2026-01-01T00:00:00Z code 3\n" * 9)
    messages = []
    for restarts in range(5):  # preemptions count in SLURM_RESTART_COUNT too, and do not matter
        process = slurm.sbatch(EXAMPLE, SLURM_RESTART_COUNT=str(restarts), **settings)
        assert process.returncode == code
        messages.append(process.stderr)
    assert slurm.calls.read_text().count(f"scontrol requeue {JOB_ID}") == requeues
    assert sum("is queued again" in message for message in messages) == requeues
    if requeues:
        assert f"restarted {requeues} times within a day" in messages[-1]


@pytest.mark.parametrize(
    ("codes", "code", "requeues"),
    [
        ((1, EXIT_PEER_LOST), 1, False),  # a bug on one machine
        ((EXIT_PEER_LOST, 1), 1, False),
        ((EXIT_USER_ERROR, EXIT_PEER_LOST), EXIT_USER_ERROR, False),
        ((EXIT_PEER_LOST, 137), 137, True),
        ((1, EXIT_PREEMPTED), EXIT_PREEMPTED, True),  # all is saved
    ],
)
def test_machine_that_failed_by_itself_decides(
    slurm: Slurm, codes: tuple[int, int], code: int, requeues: bool
) -> None:
    """srun reports the largest code, that of the machine which lost the other one."""
    python = slurm.program(
        "python_fake",
        f'c=({codes[0]} {codes[1]}); code="${{c[SLURM_NODEID]}}"\n'
        'mkdir -p "${EXIT_CODE_FILE%/*}"; echo "$code" >"$EXIT_CODE_FILE"; exit "$code"',
    )
    submitted_from = slurm.checkout()
    settings = {"PYTHON": str(python), "SLURM_SUBMIT_DIR": str(submitted_from)}
    process = slurm.sbatch(EXAMPLE, **settings)
    assert (process.returncode, slurm.has_requeued()) == (code, requeues), process.stderr
    assert not list(submitted_from.glob("*.codes"))


CONTAINERS = {
    "PYXIS_IMAGE": (
        "registry#idpo:1",
        f"--container-image registry#idpo:1 --container-mounts {ROOT}:{ROOT},/data:/data "
        f"--container-workdir {ROOT}",
        ["python"],
    ),
    "APPTAINER_IMAGE": (
        "README.md",  # only has to exist
        "",
        f"apptainer exec --nv --bind {ROOT},/data --pwd {ROOT} README.md python".split(),
    ),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_run_in_a_container(slurm: Slurm, kind: str) -> None:
    image, srun_options, program = CONTAINERS[kind]
    slurm.program(program[0], f'printf "%s\n" "$0 $*" >>{slurm.root}/started')
    del slurm.env["PYTHON"]
    settings = {kind: image, "CONTAINER_MOUNTS": "/data"}
    printed = slurm.sbatch(EXAMPLE, DRY_RUN="1", **settings).stdout.splitlines()
    for rank, line in enumerate(printed):
        words = shlex.split(line.split(": ", 1)[1])
        assert words[: len(program)] == program
        check_command(words[len(program) - 1 :], nodes=2, rank=rank)
    assert slurm.sbatch(EXAMPLE, **settings).returncode == 0
    started = (slurm.root / "started").read_text().splitlines()
    commands = (" ".join(shlex.split(line.split(": ", 1)[1])) for line in printed)
    assert sorted(started) == sorted(f"{slurm.bin}/{command}" for command in commands)
    (srun,) = (line for line in slurm.calls.read_text().splitlines() if line.startswith("srun"))
    assert srun_options in srun


def test_missing_image_is_reported(slurm: Slurm) -> None:
    process = slurm.sbatch(EXAMPLE, APPTAINER_IMAGE="missing.sif")
    assert process.returncode == EXIT_USER_ERROR and "missing.sif does not exist" in process.stderr


def test_task_that_ends_does_not_kill_tasks_that_still_save(slurm: Slurm) -> None:
    """srun would report the kill instead of the first exit code."""
    slurm.sbatch(EXAMPLE, PYTHON=str(slurm.program("python_fake", "exit 0")))
    (srun,) = (line for line in slurm.calls.read_text().splitlines() if line.startswith("srun"))
    assert "--kill-on-bad-exit=0" in srun and re.search(r"--wait [1-9]", srun)
    # Slurm signals a task's first process only.
    assert re.search(r"bash -c EXIT_CODE_FILE=\S+ exec ", srun)


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
