"""`init`: every template is a valid configuration, and no file is replaced."""

from pathlib import Path

import pytest

from megatron_idpo.cli import main as cli
from megatron_idpo.cli.init import EXAMPLES, KINDS
from megatron_idpo.cli.train import OPTIONAL, REQUIRED
from megatron_idpo.config.load import load_config
from megatron_idpo.errors import EXIT_USER_ERROR


@pytest.mark.parametrize("kind", KINDS)
def test_every_template_is_valid(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", kind, f"{kind}.yaml"]) == 0
    is_ready, has_pairs = kind in {"quickstart", "paper"}, kind == "quickstart"
    shown = f"wrote {kind}.yaml; {'next: megatron-idpo' if is_ready else 'set model.path'}"
    assert capsys.readouterr().out.startswith(shown)
    config = load_config(tmp_path / f"{kind}.yaml", required=REQUIRED, optional=OPTIONAL)
    assert config.has("sdpo") == (kind == "sdpo") and config.has("lora") == (kind != "full")
    assert (config.layout.expert > 1) == (kind == "moe")
    assert all(Path(source.path).is_file() for source in config.data.train) == has_pairs
    text = (tmp_path / f"{kind}.yaml").read_text()
    assert f"megatron-idpo train {kind}.yaml" in text
    assert " docs/" not in text, "outside a checkout there are no docs"


def test_every_example_can_be_written(tmp_path, monkeypatch, capsys):
    left_out = {"quickstart", "quickstart_sdpo", "data_look"}  # they read files of the checkout
    names = {path.stem for path in (Path(__file__).parents[2] / "examples").glob("*.yaml")}
    assert set(EXAMPLES) == names - left_out
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "llama3_8b", "my.yaml"]) == 0
    assert capsys.readouterr().out.startswith("wrote my.yaml; next: megatron-idpo")
    assert cli.main(["init", "llama3_8b_128k", "long.yaml"]) == 0
    assert "; set data.train, then: " in capsys.readouterr().out
    assert "train my.yaml" in (tmp_path / "my.yaml").read_text()


def test_a_file_is_not_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "idpo.yaml").write_text("mine")
    assert cli.main(["init"]) == EXIT_USER_ERROR
    assert "exists, and is not replaced; name another" in capsys.readouterr().err
    assert (tmp_path / "idpo.yaml").read_text() == "mine"
    assert cli.main(["init", "lroa"]) == EXIT_USER_ERROR
    assert "did you mean lora?" in capsys.readouterr().err
