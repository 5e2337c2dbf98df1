"""The command line: verbs, errors, exit codes, log messages, several ranks."""

import logging
import shlex
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_idpo import __version__
from megatron_idpo.cli import convert as cli_convert
from megatron_idpo.cli import main as cli
from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS
from megatron_idpo.errors import EXIT_USER_ERROR, CheckpointError

ROOT = Path(__file__).parents[2]


class Recorder:
    """Replaces the function of a verb: records its calls, or raises `failure`."""

    def __init__(self, failure: BaseException | None = None, code: int | None = None) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.failure = failure
        self.code = code

    def __call__(self, *args: Any, **kwargs: Any) -> int | None:
        self.calls.append((args, kwargs))
        if self.failure is not None:
            raise self.failure
        return self.code


@pytest.fixture
def replace_function(monkeypatch: pytest.MonkeyPatch) -> Any:
    def put(module: str, name: str, recorder: Recorder) -> Recorder:
        fake = ModuleType(module)
        setattr(fake, name, recorder)
        monkeypatch.setitem(sys.modules, module, fake)
        return recorder

    return put


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("direction", ["hf_to_megatron", "megatron_to_hf"])
def test_convert_passes_all_arguments(replace_function: Any, direction: str) -> None:
    from megatron_idpo.config.layout import Layout

    convert = replace_function(f"megatron_idpo.convert.{direction}", "convert", Recorder())
    words = f"convert {direction.replace('_', '-')} in out --dtype bf16 --overwrite --tensor 2"
    assert cli.main([*words.split(), "--pipeline", "4", "--virtual-pipeline", "3"]) == 0
    ((args, kwargs),) = convert.calls
    assert args == (Path("in"), Path("out"))
    # Layouts with experts require sequence parallelism, which changes no stored weight.
    layout = Layout(tensor=2, pipeline=4, virtual_pipeline=3, sequence_parallel=True)
    assert kwargs == {"dtype": "bf16", "layout": layout, "overwrite": True}


def test_defaults_of_convert(replace_function: Any) -> None:
    from megatron_idpo.config.layout import Layout

    convert = replace_function("megatron_idpo.convert.hf_to_megatron", "convert", Recorder())
    assert cli.main(["convert", "hf-to-megatron", "in", "out"]) == 0
    ((_, kwargs),) = convert.calls
    assert kwargs == {"dtype": None, "layout": Layout(), "overwrite": False}


def test_dtype_names_equal_those_of_the_converter() -> None:
    """The command line repeats them, to reject a typing error without importing torch."""
    from megatron_idpo.checkpoint.dtypes import DTYPES

    assert set(cli_convert.DTYPES) == set(DTYPES)


def test_every_verb_has_an_example_that_is_valid(tmp_path: Path) -> None:
    base = tmp_path / "idpo.yaml"
    base.write_text("model: {path: m}\ndata: {train: t}\noptimizer: {lr: 1e-4}")
    for name, verb in cli.VERBS.items():
        arguments = cli.build_parser().parse_args(shlex.split(verb.example))
        assert arguments.verb == name
        if overrides := getattr(arguments, "overrides", None):
            load_config(base, overrides, optional=SECTIONS)


def test_overrides_may_begin_with_dashes(replace_function: Any) -> None:
    doctor = replace_function("megatron_idpo.doctor.main", "main", Recorder(code=0))
    cli.main(["doctor", "run.yaml", "--layout.tensor=2", "objective.layers=[3]"])
    assert doctor.calls[0][0] == (Path("run.yaml"), ["layout.tensor=2", "objective.layers=[3]"])


def test_doctor_with_and_without_a_config(replace_function: Any) -> None:
    doctor = replace_function("megatron_idpo.doctor.main", "main", Recorder(code=7))
    assert cli.main(["doctor"]) == 7
    assert cli.main(["doctor", "run.yaml", "layout.tensor=2", "objective.layers=[3]"]) == 7
    assert [args for args, _ in doctor.calls] == [
        (None, []),
        (Path("run.yaml"), ["layout.tensor=2", "objective.layers=[3]"]),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "no verb given; begin with `megatron-idpo init`, or see `megatron-idpo --help`"),
        ("covnert a b", "unknown verb 'covnert'; did you mean convert?"),
        ("zzz", "unknown verb 'zzz'; known: init, doctor"),
        ("convert hf-to-megatorn a b", "did you mean hf-to-megatron?"),
        ("convert hf-to-megatron a", "required: OUTPUT; see `megatron-idpo convert --help`"),
        ("convert hf-to-megatron a b --dtype bf61", "did you mean bf16?"),
        ("convert hf-to-megatron a b --tensor two", "invalid int value: 'two'"),
        ("convert hf-to-megatron a b --tens 2", "--tens"),
        ("convert hf-to-megatron a b c", "unrecognized arguments: c; see `megatron-idpo convert"),
        ("train", "CONFIG.yaml is missing; `megatron-idpo init lora idpo.yaml` writes one; see"),
        ("train FILE --learning_rate 1e-4", "--learning_rate: unknown option; set optimizer.lr ("),
        ("train FILE --output-dir=x", "--output-dir: unknown option; set training.output ("),
        ("train FILE --lr 1e-4", "did you mean `optimizer.lr`? (fields are written as section."),
        ("train FILE --num_processes 2", "--num_processes: unknown option; did you mean --proc"),
        ("train FILE --nnodes 2", "--nnodes: unknown option; leave it out; --processes or"),
        ("train --config FILE", "give the file without it: `megatron-idpo train run.yaml`"),
        ("train FILE --optimizer.lr 1e-4", "--optimizer.lr: has no value; write --optimizer.lr=1e"),
        ("report runs/x --lr 3", "--lr: unknown option; see `megatron-idpo report --help`"),
        ("doctor layout.tensor=2", "layout.tensor=2: is an override without a configuration file"),
        ("train FILE x,:", "cannot parse override 'x,:'; expected section.field=value"),
    ],
)
def test_usage_errors_are_one_line(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {path: m}\ndata: {train: t}\noptimizer: {lr: 1e-4}\ntraining: {output: o}"
    )
    assert cli.main(words.replace("FILE", str(file)).split()) == EXIT_USER_ERROR
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("megatron-idpo: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_all_unknown_options_are_reported_without_their_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"train {tmp_path / 'run.yaml'} --beta 0.1 --max_steps -1 --lora_r=8"
    assert cli.main(words.split()) == EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert (
        "3 problems" in message
        and "--beta: unknown option; did you mean `objective.beta`" in message
    )
    assert "--lora_r: unknown option; set lora.rank" in message


def test_a_user_error_has_no_traceback(
    replace_function: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = CheckpointError.at("model.safetensors", "truncated", "fetch it again")
    replace_function("megatron_idpo.doctor.main", "main", Recorder(failure))
    assert cli.main(["doctor"]) == EXIT_USER_ERROR
    message = "megatron-idpo: error: model.safetensors: truncated; fetch it again\n"
    assert capsys.readouterr().err == message


def test_an_unexpected_error_keeps_its_traceback(replace_function: Any) -> None:
    replace_function("megatron_idpo.doctor.main", "main", Recorder(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_ctrl_c_is_one_line(replace_function: Any, capsys: pytest.CaptureFixture[str]) -> None:
    replace_function("megatron_idpo.doctor.main", "main", Recorder(KeyboardInterrupt()))
    assert cli.main(["doctor"]) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("megatron-idpo: interrupted; ")
    assert err.count("\n") == 1


def test_help_and_version_import_nothing_heavy() -> None:
    script = (
        "import sys, megatron_idpo.cli.main as cli\n"
        "for word in ('--version', '--help'):\n"
        "    try: cli.main([word])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "print({'torch', 'numpy', 'yaml', 'pydantic'} & set(sys.modules))\n"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.stderr == ""
    assert shown.stdout.startswith(f"megatron-idpo {__version__}\n")
    assert shown.stdout.endswith("set()\n")
    for verb in cli.VERBS:
        assert f"\n    {verb}" in shown.stdout


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (["-m", "megatron_idpo"], "usage: megatron-idpo [-h]"),
        (["tools/convert_hf_to_megatron.py"], "usage: megatron-idpo convert"),
        (["tools/convert_megatron_to_hf.py"], "usage: megatron-idpo convert"),
    ],
)
def test_other_entry_points(program: list[str], expected: str) -> None:
    shown = subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(expected)


def log_messages(path: Any, overrides: Any, *, nodes: bool, meeting: object) -> int:
    """Stands in for a verb that logs."""
    logger = logging.getLogger("megatron_idpo.train.loop")
    logger.debug("a detail")
    logger.info("resuming from step 20")
    logger.warning("1 row was skipped")
    return 0


def test_log_messages_are_printed_plainly(
    replace_function: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_function("megatron_idpo.doctor.main", "main", log_messages)
    for _ in range(2):  # the handler of the first call is gone in the second
        assert cli.main(["doctor"]) == 0
        out, err = capsys.readouterr()
        assert (out, err) == ("resuming from step 20\n", "1 row was skipped\n")


def test_only_rank_0_prints_info(
    replace_function: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    replace_function("megatron_idpo.doctor.main", "main", log_messages)
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr() == ("", "1 row was skipped\n")


class TestOneMessagePerRun:
    """Ranks of one run in turn, with a store like that of torchrun."""

    @pytest.fixture
    def rank(self, monkeypatch: pytest.MonkeyPatch, replace_function: Any) -> Any:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(store.port))
        monkeypatch.setenv("WORLD_SIZE", "3")
        replace_function("megatron_idpo.doctor.main", "main", Recorder(CheckpointError("broken")))

        def fail(rank: int, restart: int = 0) -> int:
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
            return cli.main(["doctor"])

        yield fail  # keeps the store open

    def test_only_the_first_failing_rank_prints(
        self, rank: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert {rank(2), rank(0), rank(1)} == {EXIT_USER_ERROR}
        assert capsys.readouterr().err == "megatron-idpo: error (rank 2): broken\n"

    def test_a_rank_that_fails_alone_prints(
        self, rank: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert rank(1) == EXIT_USER_ERROR
        assert capsys.readouterr().err == "megatron-idpo: error (rank 1): broken\n"

    def test_a_restarted_run_prints_again(
        self, rank: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rank(0)
        rank(0, restart=1)
        assert capsys.readouterr().err.count("broken") == 2

    def test_without_a_store_every_rank_prints(
        self, rank: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.delenv("MASTER_PORT")
        rank(0)
        rank(1)
        assert capsys.readouterr().err.count("broken") == 2


@pytest.mark.exhaustive  # 3 imports of torch; TestOneMessagePerRun is the fast equivalent
@pytest.mark.distributed
def test_under_torchrun_an_error_is_printed_once() -> None:
    launched = subprocess.run(
        f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 3 "
        "-m megatron_idpo covnert".split(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert launched.returncode != 0
    assert launched.stderr.count("did you mean convert?") == 1


def test_a_failing_import_of_megatron_points_to_the_doctor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A half-installed Transformer Engine, as megatron-core meets it while it is imported."""
    broken = tmp_path / "megatron" / "core" / "broken.py"
    broken.parent.mkdir(parents=True)
    broken.write_text("open('/nonexistent/libtransformer_engine.so')\n")

    def run(arguments: Any) -> int:
        exec(compile(broken.read_text(), str(broken), "exec"), {})
        return 0

    monkeypatch.setitem(cli.VERBS, "convert", replace(cli.VERBS["convert"], run=run))
    assert cli.main(["convert", "hf-to-megatron", "in", "out"]) == 2
    message = capsys.readouterr().err
    assert "libtransformer_engine.so" in message and "megatron-idpo doctor" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    "option", ["--tensor 2", "--pipeline-layers 1,2", "--overwrite", "--dtype bf16"]
)
def test_options_without_effect_on_the_bridge_are_errors(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"convert megatron-to-hf in out --backend bridge --hf-model hf {option}"
    assert cli.main(words.split()) == 2
    assert option.split()[0] in capsys.readouterr().err


def warn_as_megatron(path: Any, overrides: Any, *, nodes: bool, meeting: object) -> int:
    """Stands in for a verb that imports megatron-core."""
    warnings.warn("Transformer Engine and Apex are not installed. Falling back", stacklevel=1)
    return 0


def test_warnings_of_a_verbs_imports_are_not_shown(replace_function: Any) -> None:
    replace_function("megatron_idpo.doctor.main", "main", warn_as_megatron)
    with warnings.catch_warnings(record=True) as shown:
        assert cli.main(["doctor"]) == 0
    assert shown == []


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_verbs_and_options(shell, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert "likelihood" in script and "--processes" in script
