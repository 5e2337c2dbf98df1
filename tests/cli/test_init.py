"""`init`: every template is a valid configuration, and no file is replaced."""

import pytest

from megatron_idpo.cli import main as cli
from megatron_idpo.cli.init import KINDS
from megatron_idpo.cli.train import OPTIONAL, REQUIRED
from megatron_idpo.config.load import load_config
from megatron_idpo.errors import EXIT_USER_ERROR


@pytest.mark.parametrize("kind", KINDS)
def test_every_template_is_valid(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", kind, f"{kind}.yaml"]) == 0
    assert capsys.readouterr().out.startswith(f"{kind}.yaml: set model.path")
    config = load_config(tmp_path / f"{kind}.yaml", required=REQUIRED, optional=OPTIONAL)
    assert config.has("sdpo") == (kind == "sdpo") and config.has("lora") == (kind != "full")
    assert f"megatron-idpo train {kind}.yaml" in (tmp_path / f"{kind}.yaml").read_text()


def test_a_file_is_not_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "idpo.yaml").write_text("mine")
    assert cli.main(["init"]) == EXIT_USER_ERROR
    assert "exists, and is not replaced; name another" in capsys.readouterr().err
    assert (tmp_path / "idpo.yaml").read_text() == "mine"
    assert cli.main(["init", "lroa"]) == EXIT_USER_ERROR
    assert "did you mean lora?" in capsys.readouterr().err
