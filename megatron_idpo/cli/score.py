"""The verb `score`: a reference cache ahead of training, of one step or of the first of several."""

from collections.abc import Sequence
from pathlib import Path

from megatron_idpo.cli import train as cli_train
from megatron_idpo.config.run_config import load_config
from megatron_idpo.config.yaml_tree import read_tree


def main(path: Path, overrides: Sequence[str]) -> int:
    """Score; returns the exit code.

    With the section `sdpo` it reads what `train` reads, since steps change other sections.

    Raises:
        UserError: on every rank.
    """
    if read_tree(path, overrides).values.get("sdpo") is None:
        from megatron_idpo.reference.main import main as score

        return score(path, overrides)
    config = load_config(path, overrides, required=cli_train.REQUIRED, optional=cli_train.OPTIONAL)
    from megatron_idpo.sdpo.score import score_for_steps  # torch and megatron-core: after checks

    return score_for_steps(config)
