"""The table that `judge` ends with, at a terminal of 80 characters."""

import io

from rich.console import Console

from megatron_idpo.evaluate.judge.table import result_table
from megatron_idpo.evaluate.judge.tally import Tally


def test_chance_is_no_zero_and_nothing_is_no_rate() -> None:
    names = [("idpo", "base"), ("idpo", "dpo"), ("idpo", "[red]")]
    tallies = [Tally(wins=40), Tally(wins=21, losses=19), Tally(unjudged=4)]
    out = io.StringIO()
    Console(file=out, width=80).print(result_table(names, tallies))
    rows = [line.split() for line in out.getvalue().splitlines()[2:]]
    assert rows == [
        "idpo base 40 0 0 0 100.0 % 91.2 to 100.0 < 0.001".split(),
        "idpo dpo 21 19 0 0 52.5 % 37.5 to 67.1 0.875".split(),
        "idpo [red] 0 0 0 4 – – 1.000".split(),
    ]
