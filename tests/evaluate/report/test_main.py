"""The verb `report`: target, output and errors."""

from importlib.resources import files
from pathlib import Path

import pytest

from megatron_idpo.cli import main as cli
from megatron_idpo.errors import EXIT_USER_ERROR, ConfigError
from megatron_idpo.evaluate.report.main import main

from .example_runs import write_likelihood, write_run


def test_default_target_is_in_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roots = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    assert main(roots, None) == 0
    page = tmp_path / "a" / "report.html"
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert capsys.readouterr().out.startswith(f"report   {page} (")
    assert not (tmp_path / "b" / "report.html").exists()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "config.yaml",
        "hf",
        "metrics.jsonl",
        "report.html",
    ]


def test_output_option(tmp_path: Path) -> None:
    write_likelihood(tmp_path / "compared", {"base": 0.5})
    target = tmp_path / "new" / "page.html"
    assert cli.main(["report", str(tmp_path / "compared"), "--output", str(target)]) == 0
    assert target.is_file()


def test_lone_surrogate_is_replaced(tmp_path: Path) -> None:
    """JSON can express half an emoji, UTF-8 cannot."""
    root = write_run(tmp_path / "run")
    (root / "hf" / "config.json").write_text(r'{"model_type": "half \ud83d"}')
    assert main([root], None) == 0
    assert "half ?" in (root / "report.html").read_text("utf-8")


def test_unusable_directories_are_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(tmp_path / "x"), str(tmp_path)]) == EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert f"{tmp_path / 'x'}: is not a directory" in message and "Traceback" not in message


def test_unwritable_target_is_reported(tmp_path: Path) -> None:
    write_likelihood(tmp_path, {"base": 0.5})
    with pytest.raises(ConfigError, match=r"--output: .* is a directory; name a file"):
        main([tmp_path], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--output: cannot write .*: "):
        main([tmp_path], tmp_path / "file" / "page.html")


def test_failed_run_keeps_the_old_page(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run")
    main([root], None)
    before = (root / "report.html").read_bytes()
    (root / "metrics.jsonl").write_text("not metrics\n")
    with pytest.raises(ConfigError, match="has no line with a step"):
        main([root], None)
    assert (root / "report.html").read_bytes() == before


def test_template_and_styles_are_package_data() -> None:
    """Files other than modules are packaged only if `pyproject.toml` names them."""
    page = files("megatron_idpo.evaluate.report")
    others = {one.name for one in page.iterdir() if one.is_file() and not one.name.endswith(".py")}
    project = Path(__file__).parents[3] / "pyproject.toml"
    (line,) = [
        x for x in project.read_text().splitlines() if '"megatron_idpo.evaluate.report"' in x
    ]
    assert others == {"page.css", "page.html.jinja"}
    assert all(f'"{name}"' in line for name in others)
