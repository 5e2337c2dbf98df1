"""The verb `score`: what its configuration has to say."""

from pathlib import Path

import pytest

from megatron_idpo.errors import ConfigError
from megatron_idpo.reference.main import main


def config(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {{path: m}}\ndata: {{train: t.jsonl}}\n{text}")
    return file


@pytest.mark.parametrize("source", ["resident", "offloaded", "none"])
def test_a_source_that_reads_no_cache_is_refused(tmp_path: Path, source: str) -> None:
    file = config(tmp_path, f"reference: {{source: {source}}}")
    with pytest.raises(ConfigError, match=f"reference.source: is {source}, which reads no cache"):
        main(file, [])


def test_a_cache_that_nobody_reads_is_refused(tmp_path: Path) -> None:
    file = config(tmp_path, "reference: {source: resident, cache: x}")
    with pytest.raises(ConfigError, match=r"reference\.cache.*would not be read"):
        main(file, [])


def test_an_optimizer_is_none_of_its_business(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="would not be read: no part of this verb"):
        main(config(tmp_path, ""), ["optimizer.lr=1.0"])
