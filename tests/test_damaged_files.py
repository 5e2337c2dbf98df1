"""Every file that a run leaves, damaged in every way: refused by name, or the result is the same.

A run of the tiny model is stopped, one of its files is damaged, and the same command is given
again. Either it ends with an error that names the file, and deleting what the error says makes the
next attempt succeed, or it ends with the same weights, bit for bit, as a run that was not
disturbed. docs/training.md has the table.

What a finished run has exported is damaged too, and loaded as `generate` does. Only the weights
have checksums; of the other files the tests say which damage is noticed.

The files are listed from the run itself: a new one fails `test_every_file_is_classified` until it
is classified here.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import GenerationConfig

from megatron_idpo.data.tokenize.tokenizers import load_tokenizer
from megatron_idpo.errors import EXIT_PREEMPTED, UserError
from megatron_idpo.evaluate.generate.transformers_engine import _load

from .sdpo.stepped_run import stepped_config
from .train.run_hooks import stop_after
from .train.tiny_run import LORA, Files, run, write_config, write_files

pytestmark = pytest.mark.distributed

REFUSED, SAME = "refused", "the same result"

CLASSES: dict[str, dict[str, str]] = {
    "run": {
        "run/checkpoints/step-00000004/*": REFUSED,
        "run/checkpoints/step-00000002/*": SAME,  # not the newest
        "run/reference/.lock": SAME,
        "run/reference/*": REFUSED,
        "run/config.yaml": SAME,  # for people; written by each start
        "run/metrics.jsonl": SAME,  # for people; damaged lines are dropped and reported
        "run/starts.jsonl": SAME,  # for the report
        "run/.lock": SAME,
        "tokens/*.lock": SAME,
        "tokens/*/*": REFUSED,
    },
    "steps": {
        "run/manifest.json": REFUSED,
        "run/snapshots/*": REFUSED,
        "run/first_model/.lock": SAME,
        "run/first_model/*": REFUSED,
        "run/step-1/*": SAME,  # complete: its result is the snapshot
        "run/step-2/checkpoints/step-00000002/*": REFUSED,
        "run/step-2/reference/.lock": SAME,
        "run/step-2/reference/*": REFUSED,
        "run/step-2/*": SAME,
        "run/curriculum.*": SAME,  # for people; written by each start
        "run/curves.png": SAME,
        "run/metrics.jsonl": SAME,
        "run/config.yaml": SAME,
        "run/.lock": SAME,
        "tokens/*.lock": SAME,
        "tokens/*/*": REFUSED,
    },
}
"""What happens to each file of a stopped run; the first pattern that matches counts."""

MADE_AGAIN = ("tokens/*/meta.json", "*/fingerprint.json", "*/part-*")
"""Without these, what they complete is made again, with the same content."""


@dataclass(frozen=True)
class Stopped:
    """A stopped run, and the weights that it has to end with."""

    root: Path
    """Holds `run`, the output, and `tokens`, the cache."""

    kind: str
    configure: Callable[[Path], str]
    """Writes the configuration for a directory like `root`; returns its path."""

    weights: dict[str, bytes]

    exported: Path
    """The output of the undisturbed run, with `hf` and `adapter`."""

    def files(self) -> list[str]:
        paths = (path for path in self.root.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.root)) for path in paths)

    def class_of(self, name: str) -> str | None:
        classes = CLASSES[self.kind]
        return next((classes[pattern] for pattern in classes if fnmatch(name, pattern)), None)

    def copy(self, target: Path) -> Path:
        return Path(shutil.copytree(self.root, target))


def configure(kind: str, tiny: Files, root: Path, **sdpo: Any) -> str:
    sections: dict[str, Any] = {
        "data": {"eval": str(tiny.held_out), "cache": str(root / "tokens")},
        "reference": {"source": "cache"},
        "checkpoint": {"every_steps": 2, "keep_last": 2},
    }
    if kind == "run":
        return write_config(tiny, root / "run", lora=LORA, **sections)
    return stepped_config(tiny, root / "run", "merge", sdpo=sdpo, **sections)


def attempt(file: str, *hooks: Any) -> tuple[int, str]:
    """On a worker: the command; its exit code, and its error or output."""
    try:
        outcome = run(file, *hooks)
    except UserError as error:
        return 2, str(error)
    return outcome.code, outcome.printed


@pytest.fixture(scope="module")
def stopped(workers: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stopped]:
    tiny = write_files(tmp_path_factory.mktemp("tiny"))
    made: dict[str, Stopped] = {}

    def make(kind: str) -> Stopped:
        if kind not in made:
            root, whole = (tmp_path_factory.mktemp(kind) / name for name in ("parts", "whole"))
            root.mkdir(), whole.mkdir()
            [(code, printed)] = workers.run(attempt, 1, configure(kind, tiny, whole))
            assert code == 0, printed
            if kind == "steps":
                [(code, printed)] = workers.run(attempt, 1, configure(kind, tiny, root, only=1))
                assert code == 0, printed
            stop = stop_after(4 if kind == "run" else 2)
            [(code, printed)] = workers.run(attempt, 1, configure(kind, tiny, root), stop)
            assert code == EXIT_PREEMPTED, printed
            (root / "run.yaml").unlink()
            made[kind] = Stopped(
                root,
                kind,
                lambda copy: configure(kind, tiny, copy),
                weights_bytes(whole),
                whole / "run",
            )
        return made[kind]

    return make


def weights_bytes(root: Path) -> dict[str, bytes]:
    files = {file.name: file.read_bytes() for file in (root / "run" / "hf").glob("*.safetensors")}
    assert files
    return files


# ---- damage --------------------------------------------------------------------------------------


def flip(path: Path, seed: int, count: int = 1) -> None:
    """Flips random bits."""
    content, random = bytearray(path.read_bytes()), Random(seed)
    for _ in range(count):
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def exchange(path: Path, other: Path) -> None:
    """Exchanges the content of two files."""
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two), other.write_bytes(one)


def neighbor(path: Path) -> Path | None:
    """The next file of its directory with other content."""
    files = sorted(file for file in path.parent.iterdir() if file.is_file())
    at = files.index(path)
    others = (file for file in (*files[at + 1 :], *files[:at]))
    return next((file for file in others if file.read_bytes() != path.read_bytes()), None)


def namesake(path: Path, root: Path) -> Path | None:
    """The file with the same name and other content, of another step, set of pairs or model."""
    others = (file for file in sorted(root.rglob(path.name)) if file.is_file())
    return next((file for file in others if file.read_bytes() != path.read_bytes()), None)


def damage(kind: str, path: Path, root: Path) -> bool:
    """Damages a file; False if that is impossible here."""
    content = path.read_bytes()
    other = {"swap": neighbor(path), "other": namesake(path, root)}.get(kind)
    if kind in ("swap", "other"):
        if other is None:
            return False
        exchange(path, other) if kind == "swap" else path.write_bytes(other.read_bytes())
    elif kind == "delete":
        path.unlink()
    elif not content:
        return False
    elif kind == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        flip(path, seed=len(content), count=100 if kind == "flip 100 bits" else 1)
    return True


DAMAGES = ("flip", "flip 100 bits", "truncate", "swap", "delete", "other")


def check(workers: Any, run_: Stopped, root: Path, name: str, kind: str) -> str:
    """Gives the command again; after an error, once more with its remedy. Returns what happened."""
    file, what = run_.configure(root), f"{name}, {kind}"
    [(code, printed)] = workers.run(attempt, 1, file)
    happened = REFUSED if code else SAME
    if code:
        # Of two files that were exchanged, either may be named. A record of another directory is
        # reported with the directory, and a missing one also with the file that needs it.
        is_named = str(root / name) in printed
        if kind in ("swap", "delete", "other"):
            is_named |= str((root / name).parent) in printed
        assert is_named, printed
        follow_remedy(printed, run_, root, name)
        [(code, printed)] = workers.run(attempt, 1, file)
    assert (code, what) == (0, what), printed
    assert weights_bytes(root) == run_.weights, what
    return happened


def follow_remedy(printed: str, run_: Stopped, root: Path, name: str) -> None:
    """Deletes what an error says, or puts the files back if it says so."""
    location = re.escape(str(root))
    found = re.search(rf"delete ({location}[^\s,;]*)", printed)
    if found is None and "delete it" in printed:
        found = re.match(rf"({location}[^\s:]*): ", printed)
    if found is None:
        assert "restore" in printed, printed
        copied = (root / name).parent
        shutil.rmtree(copied)
        shutil.copytree(run_.root / copied.relative_to(root), copied)
        return
    target = Path(found[1])
    assert target not in (root, root / "run", root / "tokens")
    shutil.rmtree(target) if target.is_dir() else target.unlink()


def expected(run_: Stopped, name: str, kind: str) -> set[str]:
    """What may happen."""
    is_made_again = kind == "delete" and any(fnmatch(name, pattern) for pattern in MADE_AGAIN)
    is_swapped = kind == "swap"  # with a file that may be of the other class
    return {REFUSED, SAME} if is_swapped or is_made_again else {run_.class_of(name) or ""}


# ---- tests ---------------------------------------------------------------------------------------

KINDS = ["run", pytest.param("steps", marks=pytest.mark.exhaustive)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_is_classified(stopped: Any, kind: str) -> None:
    run_ = stopped(kind)
    assert [name for name in run_.files() if run_.class_of(name) is None] == []
    assert [one for one in CLASSES[kind] if not any(fnmatch(n, one) for n in run_.files())] == []


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        ("run/checkpoints/step-00000004/__0_0.distcp", "other"),
        ("run/checkpoints/step-00000004/progress.json", "flip"),
        ("tokens/*/pairs.arrow", "flip"),
    ],
)
def test_damaged_file_is_refused(
    stopped: Any, workers: Any, tmp_path: Path, pattern: str, kind: str
) -> None:
    """The light case of the next test."""
    run_ = stopped("run")
    root = run_.copy(tmp_path / "copy")
    name = next(name for name in run_.files() if fnmatch(name, pattern))
    assert damage(kind, root / name, root)
    assert check(workers, run_, root, name, kind) == REFUSED


@pytest.mark.exhaustive  # about 150 runs of a few seconds each
@pytest.mark.parametrize("damage_kind", DAMAGES)
@pytest.mark.parametrize("kind", CLASSES)
def test_every_damaged_file_is_refused_or_harmless(
    stopped: Any, workers: Any, tmp_path: Path, kind: str, damage_kind: str
) -> None:
    run_ = stopped(kind)
    wrong = {}
    for name in run_.files():
        root = run_.copy(tmp_path / "copy")
        if damage(damage_kind, root / name, root):
            happened = check(workers, run_, root, name, damage_kind)
            print(f"{name} | {damage_kind} | {happened}")
            if happened not in expected(run_, name, damage_kind):
                wrong[name] = happened
        shutil.rmtree(root)
    assert wrong == {}


def test_edited_step_is_refused(stopped: Any, workers: Any, tmp_path: Path) -> None:
    """Adam's bias correction would be that of another step."""
    run_ = stopped("run")
    root = run_.copy(tmp_path / "copy")
    name = "run/checkpoints/step-00000004/progress.json"
    text = (root / name).read_text()
    assert '"optimizer_steps": 4' in text
    (root / name).write_text(text.replace('"optimizer_steps": 4', '"optimizer_steps": 7'))
    assert check(workers, run_, root, name, "edited") == REFUSED


def test_renamed_checkpoint_is_refused(stopped: Any, workers: Any, tmp_path: Path) -> None:
    """Deleting it, as the error says, resumes from the step before it."""
    run_ = stopped("run")
    root = run_.copy(tmp_path / "copy")
    checkpoints = root / "run" / "checkpoints"
    (checkpoints / "step-00000004").rename(checkpoints / "step-00000006")
    name = "run/checkpoints/step-00000006"
    assert check(workers, run_, root, name, "renamed") == REFUSED


# ---- exports -------------------------------------------------------------------------------------

WEIGHTS = "*/*.safetensors"
"""Of the exported files only these have checksums. People edit the others."""


def loaded(run_directory: Path) -> dict[str, Any]:
    """All that `generate` uses of an export: weights, adapter, tokens, end tokens."""
    directory = run_directory / "hf"
    config = GenerationConfig.from_pretrained(directory)
    tokenizer = load_tokenizer(str(directory))
    model = SimpleNamespace(
        directory=directory, adapter=run_directory / "adapter", dtype=torch.float32
    )
    state: dict[str, Any] = _load(cast("Any", model)).state_dict()
    tokens = tokenizer.encode(["The sky, 12 é\n"], special_tokens=True)
    return {
        "weights": {name: tensor.numpy().tobytes() for name, tensor in sorted(state.items())},
        "tokens": [tokens, tokenizer.identity, config.eos_token_id],
    }


def load_damaged(exported: Path, name: str, kind: str, root: Path) -> str | None:
    """What happens to an export of which a file was damaged; None if that is impossible."""
    shutil.copytree(exported / "hf", root / "hf")
    shutil.copytree(exported / "adapter", root / "adapter")
    try:
        if not damage(kind, root / name, root):
            return None
        return SAME if loaded(root) == loaded(exported) else "other content"
    except UserError as error:
        assert str(root) in str(error), error
        return REFUSED
    except Exception as error:  # of a library: files without checksums
        return f"{type(error).__name__}"
    finally:
        shutil.rmtree(root / "hf"), shutil.rmtree(root / "adapter")


def export_files(exported: Path) -> list[str]:
    paths = (path for part in ("hf", "adapter") for path in (exported / part).rglob("*"))
    return sorted(str(path.relative_to(exported)) for path in paths if path.is_file())


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_exported_weights_are_refused(stopped: Any, tmp_path: Path, kind: str) -> None:
    exported = stopped("run").exported
    for name in (name for name in export_files(exported) if fnmatch(name, WEIGHTS)):
        assert load_damaged(exported, name, kind, tmp_path) in (REFUSED, None), name


@pytest.mark.exhaustive  # about 100 loads of half a second each
@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_of_each_exported_file(stopped: Any, tmp_path: Path, kind: str) -> None:
    """The table of docs/evidence.md; what is loaded of files without checksums is not checked."""
    exported = stopped("run").exported
    for name in export_files(exported):
        happened = load_damaged(exported, name, kind, tmp_path)
        print(f"{name} | {kind} | {happened}")
        assert happened in (REFUSED, None) or not fnmatch(name, WEIGHTS), name
