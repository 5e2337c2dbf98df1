"""Without lm-eval, or with an old one, a user is told what to install."""

import importlib.metadata
import io

import pytest

from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.lm_eval.backend import _WithoutBars, lm_eval_version


def test_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    with pytest.raises(ConfigError, match=r"is not installed; pip install 'megatron-idpo\["):
        lm_eval_version()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.9")
    with pytest.raises(ConfigError, match=r"is 0\.4\.9, at least 0\.4\.13 is needed"):
        lm_eval_version()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.0")
    assert lm_eval_version() == "0.5.0"


def test_a_file_gets_messages_and_no_bars() -> None:
    from tqdm import tqdm

    stream = io.StringIO()
    quiet = _WithoutBars(stream)
    for _ in tqdm(range(3), file=quiet):
        pass
    quiet.write("a warning\n")
    assert stream.getvalue() == "a warning\n"
