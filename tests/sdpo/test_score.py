"""The verb `score` with steps: training reads the scores."""

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.errors import EXIT_PREEMPTED, CheckpointError, ConfigError

from ..train.run_hooks import stop_after
from ..train.tiny_run import NUM_LAYERS
from .stepped_run import THREE_STEPS, Files, cached_logps, run, stepped_config

pytestmark = pytest.mark.distributed


def score(file: str, *overrides: str) -> tuple[int, str]:
    """The verb `score`: exit code and output."""
    from megatron_idpo.cli.main import console_logging
    from megatron_idpo.cli.train import score as main

    with redirect_stdout(StringIO()) as printed, console_logging():
        code = main(Path(file), list(overrides))
    return code, printed.getvalue()


def test_training_reads_scores_of_another_layout(tiny: Files, workers: Any, tmp_path: Path) -> None:
    """At the layers of all steps; `reference.cache` is not used."""
    output = tmp_path / "run"
    reference = {"cache": str(tmp_path / "caches")}
    file = stepped_config(tiny, output, steps=THREE_STEPS, reference=reference)
    [(code, printed), _] = workers.run(score, 2, file, "layout.pipeline=2")
    assert code == 0 and f"{output / 'first_model'}" in printed
    before = (output / "first_model" / "reference.parquet").read_bytes()
    assert set(cached_logps(output / "first_model")) == {1, 2, 3, NUM_LAYERS}
    assert not (tmp_path / "caches").exists() and not (output / "reference").exists()
    [outcome] = workers.run(run, 1, file, stop_after(2))
    assert outcome.code == EXIT_PREEMPTED and "training pairs in" not in outcome.printed
    assert (output / "first_model" / "reference.parquet").read_bytes() == before


def test_objective_layers_all_scores_every_layer(tiny: Files, workers: Any, tmp_path: Path) -> None:
    output = tmp_path / "run"
    [(code, _)] = workers.run(score, 1, stepped_config(tiny, output), "objective.layers=all")
    assert code == 0
    assert set(cached_logps(output / "first_model")) == {1, 2, 3, NUM_LAYERS}


def test_invalid_layers_and_other_data_are_reported(
    tiny: Files, workers: Any, tmp_path: Path
) -> None:
    file = stepped_config(tiny, tmp_path / "run")
    with pytest.raises(ConfigError, match="layer 9 does not exist"):
        workers.run(score, 1, file, "objective.layers=[9]")
    assert workers.run(score, 1, file)[0][0] == 0
    with pytest.raises(CheckpointError, match=r"first_model: cache was made .*; delete it to"):
        workers.run(score, 1, file, "data.max_length=64")
