"""Without lm-eval, or with an old version, the error says what to install."""

import importlib.metadata

import pytest

from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.lm_eval.tasks import lm_eval_version


def test_missing_or_old_lm_eval_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    with pytest.raises(ConfigError, match=r"is not installed; pip install 'lm-eval\["):
        lm_eval_version()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.9")
    with pytest.raises(ConfigError, match=r"is 0\.4\.9, needs at least 0\.4\.13"):
        lm_eval_version()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.0")
    assert lm_eval_version() == "0.5.0"
