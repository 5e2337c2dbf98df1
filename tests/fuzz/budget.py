"""How many inputs a fuzz test tries, and counting them.

In `make test` each test tries its usual number, a few seconds in all. `make fuzz` (`tools/fuzz.py`)
repeats them with other seeds and `FUZZ_FACTOR` times as many inputs. Failing inputs are kept in
`.hypothesis/fuzz` and tried first by the next run; those that led to a correction are `@example`s.
"""

import os
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase

ROOT = Path(__file__).parents[2]
FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))

COUNTS: Counter[str] = Counter()
"""Number of inputs by `sort: outcome`; `conftest.py` prints it."""


def inputs(usual: int) -> settings:
    """Settings of a fuzz test that tries this many inputs in `make test`."""
    return settings(
        max_examples=usual * FACTOR,
        deadline=None,
        print_blob=True,
        database=DirectoryBasedExampleDatabase(ROOT / ".hypothesis" / "fuzz"),
        suppress_health_check=list(HealthCheck),
    )


def count(sort: str, outcome: str) -> None:
    """Counts an input."""
    COUNTS[f"{sort}: {outcome}"] += 1
