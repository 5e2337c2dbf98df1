"""Fuzzing for a given time: `make fuzz MINUTES=60`, or `python tools/fuzz.py --minutes 60`.

Runs the tests of `tests/fuzz` in rounds, each file with a seed that is printed and with more inputs
than in `make test`, until the time is over. A failure is printed and its seed is kept in
`.hypothesis/fuzz/failures.txt`; the failing input itself is in `.hypothesis/fuzz`, and the next run
tries it first. At the end: how many inputs of each sort were tried.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import SystemRandom

ROOT = Path(__file__).parents[1]
DATABASE = ROOT / ".hypothesis" / "fuzz"
FACTOR = 5
"""Inputs of a round, in multiples of those in `make test`: a round takes seconds to minutes."""

_COUNT = re.compile(r"^fuzzed (.+): (.+?) (\d+)$", re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz, print the counts; 1 if an input failed."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=10, help="how long (default: 10)")
    parser.add_argument("--seed", type=int, help="of the first round; repeats a round")
    parser.add_argument("tests", nargs="*", type=Path, help="files (default: all of tests/fuzz)")
    options = parser.parse_args(arguments)
    tests = options.tests or sorted((ROOT / "tests" / "fuzz").glob("test_*.py"))
    end_s = time.monotonic() + 60 * options.minutes
    counts: Counter[str] = Counter()
    failures: list[str] = []
    seed = options.seed
    while True:
        for test in tests:
            if time.monotonic() >= end_s:
                return _report(counts, failures)
            seed = SystemRandom().randrange(1 << 32) if seed is None else seed
            _round(test, seed, counts, failures)
        seed = None


def _round(test: Path, seed: int, counts: Counter[str], failures: list[str]) -> None:
    begun_s = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"--hypothesis-seed={seed}", str(test)],
        cwd=ROOT,
        env={**os.environ, "FUZZ_FACTOR": str(FACTOR)},
        capture_output=True,
        text=True,
    )
    for sort, outcome, number in _COUNT.findall(done.stdout):
        counts[f"{sort}: {outcome}"] += int(number)
    result = "ok" if done.returncode == 0 else "FAILED"
    seconds = time.monotonic() - begun_s
    print(f"{test.stem} --seed {seed}: {result} in {seconds:.0f} s", flush=True)
    if done.returncode:
        failures.append(f"{test.name} --seed {seed}")
        DATABASE.mkdir(parents=True, exist_ok=True)
        with (DATABASE / "failures.txt").open("a") as file:
            print(failures[-1], file=file)
        print(done.stdout + done.stderr, flush=True)


def _report(counts: Counter[str], failures: Sequence[str]) -> int:
    for outcome, number in sorted(counts.items()):
        print(f"{number:>9,}  {outcome}")
    print(f"{sum(counts.values()):>9,}  inputs; failed rounds: {', '.join(failures) or 'none'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
