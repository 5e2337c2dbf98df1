"""The verb `data`: its output, the figure, and one-line errors."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_idpo.cli import main as cli
from megatron_idpo.config.data import DataConfig
from megatron_idpo.config.layout import Layout
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.data.run_pairs import row_settings
from megatron_idpo.errors import EXIT_USER_ERROR

SHARED = Path(__file__).parents[4] / "shared"
WIDTHS = (40, 120)


@pytest.fixture(autouse=True)
def single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def config(tmp_path: Path, text_tokenizer_path: str, write_jsonl: Callable[..., str]) -> Path:
    records = [
        {"prompt": f"Question {at}?", "chosen": " Yes." * (at + 1), "rejected": " No." * (at % 5)}
        for at in range(1, 31)
    ]
    for record in records[4::5]:
        record["rejected"] = " Never."
    values = {
        "model": {"path": text_tokenizer_path},
        "data": {
            "train": write_jsonl(records),
            "row_tokens": 256,
            "max_length": 90,
            "trim_tokens": 32,
            "num_workers": 1,
            "cache": str(tmp_path / "cache"),
        },
        "training": {"output": str(tmp_path / "out"), "global_batch_pairs": 8},
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(values))
    return path


def row_lines(out: str) -> dict[str, str]:
    """The values below `Rows`, by their names."""
    lines = out.split("Rows, median")[1].splitlines()[1:]
    return {line[:16].strip(): line[16:].strip() for line in lines if line[:16].strip()}


def test_output_and_figure(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", str(config)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for heading in ("The pair of median length", "The longest pair", "The shortest pair"):
        assert out.count(heading) == 1
    assert out.count("✂ truncated at max_length") == 1, "the longest pair's chosen answer"
    assert "train  30 pairs kept of 30 rows" in out
    assert " of them truncated at max_length" in out
    rows = row_lines(out)
    assert rows["steps"].startswith("3 of 8 pairs in 1 epoch; the last 6 pairs do not fill a step")
    assert rows["row length"].endswith("positions, limit 256")
    assert rows["row fill"].endswith("% of the computed positions hold a token")
    assert rows["prompt sharing"].endswith("× fewer positions than with every prompt stored twice")
    figure = Path(out.splitlines()[-1].removeprefix("figure  "))
    assert figure == config.parent / "out" / "data.png"
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("columns", WIDTHS)
def test_output_fits_the_terminal(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["data", str(config)]) == 0
    *lines, _ = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert "…" not in "".join(lines)


def test_rows_per_rank(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With interleaving over two stages the rows on a rank are a multiple of 2."""
    layout = "layout={tensor: 2, pipeline: 2, virtual_pipeline: 2}"
    monkeypatch.setenv("WORLD_SIZE", "12")
    assert cli.main(["data", str(config), layout]) == 0
    rows = row_lines(capsys.readouterr().out)
    assert rows["rows per step"] == "2 on each of 3 data-parallel ranks"
    assert rows["pairs per row"].startswith("1 (1 to ")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["data", str(config), layout]) == 0
    assert capsys.readouterr().out == "", "only rank 0 prints"
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert cli.main(["data", str(config), layout]) == EXIT_USER_ERROR
    assert "= 4 ranks do not divide the world of 6" in capsys.readouterr().err


def test_row_settings_of_a_run() -> None:
    data = DataConfig(train="x", row_tokens=2048, trim_tokens=64, share_prompt=False)
    config = RunConfig.model_construct(data=data, layout=Layout(tensor=2, pipeline=2))
    settings = row_settings(config, 8)
    assert (settings.row_tokens, settings.trim_tokens, settings.share_prompt) == (2048, 64, False)
    assert (settings.data_size, settings.rows_multiple) == (2, 1)


def test_mixture_held_out_pairs_and_no_sharing(
    config: Path, capsys: pytest.CaptureFixture[str], write_jsonl: Callable[..., str]
) -> None:
    other = write_jsonl([{"prompt": "Q:", "chosen": " a", "rejected": " b"}] * 4, "other.jsonl")
    first = json.loads(config.read_text())["data"]["train"]
    overrides = [f"data.train=[{first}, {{path: {other}, weight: 2}}]", "data.eval_pairs=5"]
    assert cli.main(["data", str(config), *overrides, "data.share_prompt=false"]) == 0
    out = "".join(capsys.readouterr().out.split())
    held_out = int(out.split("pairsheldout")[0].rsplit("eval", 1)[1])
    assert 5 <= held_out < 13, "other.jsonl has one prompt, eight times"
    assert "pairsperepochfrom" in out and "pair,prompttwice" in out
    assert "off;data.share_promptwouldsave" in out
    assert cli.main(["data", str(config), f"data.eval={other}"]) == 0
    assert "eval   4 pairs kept of 4 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=missing.jsonl", "missing.jsonl: no such file or directory; check the path"),
        ("data.max_length=2", "none of its 30 rows is left"),
        ("data.truncation=error", "more than max_length 90; set data.max_length to"),
        ("training.global_batch_pairs=31", "one batch needs 31 pairs, the run has 1 x 30"),
        ("data.format=chat", "the format is 'chat'"),
        (
            "model.path=/nowhere/at/all",
            "/nowhere/at/all: is not a directory; name a model directory",
        ),
        ("objective.beta=1", "objective"),
    ],
)
def test_user_error_is_one_line_without_a_traceback(
    config: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert cli.main(["data", str(config), override]) == EXIT_USER_ERROR
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("megatron-idpo: error: ") and message in err


def test_bad_row_is_reported(
    config: Path, capsys: pytest.CaptureFixture[str], write_jsonl: Callable[..., str]
) -> None:
    path = write_jsonl([{"prompt": "Q", "chosen": "A", "rejected": "B"}, b"{"], "bad.jsonl")
    assert cli.main(["data", str(config), f"data.train={path}"]) == EXIT_USER_ERROR
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{path}:2: not JSON" in err


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="needs shared data")
@pytest.mark.parametrize("name", ["hh_harmless_base_test", "finegrained_qa_feedback_dev"])
def test_real_data(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    source = SHARED / "data" / f"{name}.jsonl"
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)[:60]
    (tmp_path / "some.jsonl").write_text("".join(lines), encoding="utf-8")
    overrides = [
        f"data.train={tmp_path / 'some.jsonl'}",
        f"data.chat_template={template!r}",
        f"model.path={SHARED / 'models' / 'stories260K'}",
        "data.row_tokens=8192",
        "data.max_length=2048",
    ]
    assert cli.main(["data", str(config), *overrides]) == 0
    out = capsys.readouterr().out
    rows = row_lines(out)
    assert 50 < float(rows["row fill"].split("%")[0]) <= 100
    assert float(rows["prompt sharing"].split()[0]) > 1
