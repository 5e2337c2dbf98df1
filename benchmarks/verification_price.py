"""What it costs to compute checksums while writing and to compare them while reading.

    python benchmarks/verification_price.py [--directory DIR] [--gigabytes 1] [--rounds 5] [--save]

Three artefacts of the given size, in one process, from and to the page cache:

* **checkpoint**: a training state, saved and loaded as `train` does (it is written on a thread
  while training continues; here the thread's work is timed);
* **cache**: a store of tokenized pairs, written batch by batch, then every pair read once in random
  order; writing includes the sha256 fingerprint of the tokens, which it has anyway;
* **data set**: a file of records. A run identifies it by its sha256 each time it starts; without
  that, the file is only read.

Each is done with and without checksums (`storage/checksums.py` made to do nothing), `--rounds`
times, as often in one order as in the other. The table has medians of wall time and of CPU time,
which other load on the machine affects less. Hashing takes user time only. System time is separate,
because that of writing varies between two runs by more than hashing takes: the system finds and
clears pages for the file, and writes back those of the run before. The price is the median over
rounds of the difference within a round. The last table is the speed of the hash functions alone on
data in memory, and of what was there before: the CRC-32 that Python's zipfile compares.
"""

import argparse
import hashlib
import os
import resource
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
import xxhash
from result_file import commit, processor, report_result

from megatron_idpo.checkpoint.contents import Contents, read_contents, write_contents
from megatron_idpo.checkpoint.dcp_planner import read_chunks, write_chunks
from megatron_idpo.checkpoint.tensor_chunks import TensorChunk
from megatron_idpo.config.data import SourceConfig
from megatron_idpo.data.report import DataReport
from megatron_idpo.data.sources.open import open_source
from megatron_idpo.data.tokenize import store
from megatron_idpo.data.tokenize.store import COLUMNS, PairStore, PairStoreWriter, TokenBatch
from megatron_idpo.mcore.parallel.world import distributed_world
from megatron_idpo.storage.checksums import Checksum

LIBRARIES = ("xxhash", "torch", "pyarrow", "megatron-core")
TENSOR_BYTES = 16 << 20
BATCH_PAIRS = 512
PAIR_TOKENS = (300, 300, 300)
"""Prompt, chosen and rejected answer."""

type Job = Callable[[Path], None]
"""Uses a directory that no other kind of run uses."""


@contextmanager
def without_checksums() -> Iterator[None]:
    """Nothing is hashed, and nothing is read in order to be hashed."""
    with ExitStack() as stack:
        for target, name, nothing in (
            (Checksum, "update", lambda *_: None),
            (Contents, "is_unchanged", lambda *_: True),
            (Contents, "check_files", lambda *_: None),
            (store, "checksum", lambda *_: ""),
            (store, "check_file", lambda *_, **__: None),
        ):
            stack.enter_context(patch.object(target, name, nothing))
        yield


# ---- what is timed ------------------------------------------------------------------------------


def checkpoint_jobs(num_bytes: int) -> dict[str, Job]:
    """Saving and loading a training state."""
    count = num_bytes // TENSOR_BYTES
    tensors = [torch.randn(TENSOR_BYTES // 4).view(1024, -1) for _ in range(count)]
    chunks = [
        TensorChunk(f"tensor{index}", tuple(tensor.shape), (0, 0), tensor, True, False)
        for index, tensor in enumerate(tensors)
    ]
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)

    def save(directory: Path) -> None:
        target = directory / "step-00000001"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        pieces = write_chunks(chunks, target, group, location=target)
        write_contents(target, pieces, target=target)

    def load(directory: Path) -> None:
        target = directory / "step-00000001"
        contents = read_contents(target, is_state=True)
        contents.check_files()
        read_chunks(chunks, target, contents)

    return {"checkpoint, save": save, "checkpoint, load": load}


def cache_jobs(num_bytes: int) -> dict[str, Job]:
    """Writing a store of tokenized pairs, and reading every pair."""
    num_batches = num_bytes // (4 * sum(PAIR_TOKENS) * BATCH_PAIRS)
    random = np.random.default_rng(0)
    arrays = [
        pa.ListArray.from_arrays(
            np.arange(BATCH_PAIRS + 1, dtype=np.int32) * length,
            random.integers(0, 32000, BATCH_PAIRS * length, dtype=np.int32),
        )
        for length in PAIR_TOKENS
    ]
    rows = np.arange(BATCH_PAIRS)
    columns = [*arrays, pa.array(0 * rows, pa.int32()), pa.array(rows, pa.int64())]
    batch = TokenBatch(
        pa.RecordBatch.from_arrays(columns, schema=store.arrow_schema()),
        (),
        DataReport(kept_pairs=BATCH_PAIRS),
    )
    assert batch.pairs.schema.names[: len(COLUMNS)] == list(COLUMNS)

    def write(directory: Path) -> None:
        target = directory / "pairs"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        writer = PairStoreWriter(target, target.name)
        for _ in range(num_batches):
            writer.append(batch)
        writer.finish()

    def read(directory: Path) -> None:
        opened = PairStore(directory / "pairs")
        total = int(opened.lengths_P3.sum())
        for index in random.permutation(opened.num_pairs):
            total += sum(int(tokens.sum()) for tokens in opened.tokens(int(index)))

    return {"cache, write": write, "cache, read all pairs": read}


def write_records(file: Path, num_bytes: int) -> None:
    """Write a file of records."""
    record = b'{"prompt": "%s", "chosen": "%s", "rejected": "%s"}\n' % ((b"word " * 100,) * 3)
    with file.open("wb") as sink:
        for _ in range(num_bytes // len(record)):
            sink.write(record)


def identify(directory: Path) -> None:
    """The identity of the file of records."""
    open_source(SourceConfig(path=str(directory / "records.jsonl"))).digest()


def read_only(directory: Path) -> None:
    """The file of records, read and not used."""
    block = bytearray(1 << 20)
    with (directory / "records.jsonl").open("rb", buffering=0) as source:
        while source.readinto(block):
            pass


# ---- measuring ----------------------------------------------------------------------------------


def seconds(job: Callable[[], object]) -> tuple[float, float, float]:
    """How long a call takes: wall time, user and system time of all threads."""
    start_s, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    job()
    wall_s, after = time.perf_counter() - start_s, resource.getrusage(resource.RUSAGE_SELF)
    return wall_s, after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime


def unchecked(job: Job) -> Job:
    """The job without checksums."""

    def run(directory: Path) -> None:
        with without_checksums():
            job(directory)

    return run


def medians(
    jobs: dict[str, tuple[Job, Job]], directories: tuple[Path, Path], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each job with and without checksums: wall, user and system time, and the price.

    The first round is warm-up. Then each order comes first as often as the other.
    """
    taken: dict[str, list[list[float]]] = {name: [] for name in jobs}
    for index in range(rounds + 1):
        for name, both in jobs.items():
            pair: dict[int, tuple[float, ...]] = {}
            for which in (0, 1) if index % 2 else (1, 0):
                pair[which] = seconds(partial(both[which], directories[which]))
            times = [value for one in zip(pair[0], pair[1], strict=True) for value in one]
            prices = [times[at] - times[at + 1] for at in (2, 4)]
            taken[name] += [[*times, *prices]] if index else []
    return {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in taken.items()
    }


def hash_speeds(num_bytes: int) -> dict[str, float]:
    """GB/s of hash functions on data in memory, in blocks of 1 MiB."""
    data = np.random.default_rng(0).bytes(min(num_bytes, 256 << 20))
    blocks = [memoryview(data)[start : start + (1 << 20)] for start in range(0, len(data), 1 << 20)]

    def speed(update: Callable[[Any], object]) -> float:
        cpu_s = min(sum(seconds(lambda: list(map(update, blocks)))[1:]) for _ in range(5))
        return len(data) / 1e9 / cpu_s

    return {
        "xxh3_128 (checksums)": speed(xxhash.xxh3_128().update),
        "sha256 (identities)": speed(hashlib.sha256().update),
        "blake2b": speed(hashlib.blake2b().update),
        "crc32 (zipfile)": speed(zlib.crc32),
    }


def main() -> None:
    """Print the report; with `--save` also into `benchmarks/results/`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--directory", type=Path, help="on the disk to measure; needs 6 x the size")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    if options.rounds % 2:
        parser.error("--rounds has to be even: with and without take turns to come first")
    num_bytes = int(options.gigabytes * 1e9)
    with distributed_world(), tempfile.TemporaryDirectory(dir=options.directory) as name:
        directories = Path(name, "with"), Path(name, "without")
        for directory in directories:
            directory.mkdir()
            write_records(directory / "records.jsonl", num_bytes)
        checked = checkpoint_jobs(num_bytes) | cache_jobs(num_bytes)
        jobs = {name: (job, unchecked(job)) for name, job in checked.items()}
        jobs["data set, identify"] = identify, read_only
        taken = medians(jobs, directories, options.rounds)
    rows = [
        f"| {name} | {' | '.join(f'{value:.2f}' for value in values[:6])} "
        f"| {values[6]:+.2f} | {values[7]:+.2f} |"
        for name, values in taken.items()
    ]
    speeds = [f"| {name} | {speed:.1f} |" for name, speed in hash_speeds(num_bytes).items()]
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    text = "\n".join(
        [
            "# What checksums cost\n",
            f"{date.today()}, {processor()}, {torch.get_num_threads()} threads; {libraries}; "
            f"commit {commit()}; load average {os.getloadavg()[0]:.1f}. {options.gigabytes:g} GB "
            f"each, medians of {options.rounds}. What is measured, and how, stands in "
            "`benchmarks/verification_price.py`.\n",
            "| | wall with, s | without | user with, s | without | system with, s | without "
            "| price, user | price, system |\n|---|---|---|---|---|---|---|---|---|",
            *rows,
            "\n| hash function | GB/s |\n|---|---|",
            *speeds,
        ]
    )
    report_result("verification-price", text, save=options.save)


if __name__ == "__main__":
    main()
