"""Nothing that a file holds is run: our sources, and the libraries with what they are given.

The source rules read every module that is shipped; `tests/checkpoint/test_dcp_metadata.py` covers
the list of tensors of a checkpoint.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_idpo.data.tokenize.tokenizers import load_tokenizer
from megatron_idpo.errors import CheckpointError, DataError, UserError
from megatron_idpo.testing import write_tiny_hf_model

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("megatron_idpo", "tools", "launch", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

UNPICKLERS = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
MAY_UNPICKLE = {
    "benchmarks/checkpoint_plans.py": "its own objects, as torch exchanges them between ranks",
    "megatron_idpo/checkpoint/dcp_metadata.py": "the unpickler that knows only what DCP writes",
    "megatron_idpo/testing/messages.py": "between a test and the workers that it has started",
}
TRUSTING = {"from_pretrained", "from_config", "from_hf_pretrained", "import_ckpt", "HFLM", "LLM"}
"""Calls of Transformers, vLLM, lm-eval and Megatron-Bridge that can run a repository's code."""

WITHOUT_CODE = {"PeftModel"}
"""Classes whose `from_pretrained` has no such argument and runs no code."""

OWN_TEMPLATES = {"megatron_idpo/evaluate/report/main.py"}


def violations(path: str, text: str) -> Iterator[str]:
    """What in a source could run code from a file."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            keywords = {one.arg: ast.unparse(one.value) for one in node.keywords}
            function = ast.unparse(node.func)
            owner, _, name = function.rpartition(".")
            is_trusting = name in TRUSTING and owner not in WITHOUT_CODE
            if is_trusting and keywords.get("trust_remote_code") != "False":
                yield f"{function} without trust_remote_code=False"
            if function == "torch.load" and keywords.get("weights_only") != "True":
                yield "torch.load without weights_only=True"
            if owner in ("np", "numpy") and keywords.get("allow_pickle", "False") != "False":
                yield f"{function} with allow_pickle"
            if owner == "yaml" and name in ("load", "load_all", "full_load", "unsafe_load"):
                yield f"{function} constructs what a tag names"
            if function in ("eval", "exec", "FileSystemReader"):
                yield f"{function} runs what it reads"
            if owner == "dist_checkpointing" and name.startswith("load"):
                yield f"{function} unpickles .metadata"
            if name in ("Environment", "Template") and path not in OWN_TEMPLATES:
                yield f"{function} is not a sandbox"
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        if is_import and path not in MAY_UNPICKLE:
            module = getattr(node, "module", None)
            names = [module] if module else [alias.name for alias in node.names]
            yield from (f"imports {name}" for name in names if name.split(".")[0] in UNPICKLERS)
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            yield from ("imports load" for alias in node.names if alias.name == "load")


def test_no_source_runs_code_from_files():
    found = [
        f"{name}: {violation}"
        for path in SOURCES
        for name in [path.relative_to(ROOT).as_posix()]
        for violation in violations(name, path.read_text("utf-8"))
    ]
    assert len(SOURCES) > 200 and not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=flag)",
        "from torch import load",
        "import pickle",
        "from dill import loads",
        "AutoModel.from_pretrained(path)",
        "transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust)",
        "auto_class.from_config(config)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "FileSystemReader(path).read_metadata()",
        "dist_checkpointing.load(state, path)",
        "jinja2.Environment().from_string(text)",
        "eval(text)",
    ],
)
def test_the_rules_see_each_kind(text):
    assert list(violations("megatron_idpo/x.py", text))


# ---- repositories with code -----------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A model of an unknown type whose files name Python code in it; the user answers `y`."""
    directory = write_tiny_hf_model(tmp_path / "model", "llama")
    code = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    for name in ("configuration_x", "modeling_x", "tokenization_x"):
        (directory / f"{name}.py").write_text(code)
    classes = {
        "AutoConfig": "configuration_x.XConfig",
        "AutoModelForCausalLM": "modeling_x.XForCausalLM",
        "AutoTokenizer": ["tokenization_x.XTokenizer", None],
    }
    config = directory / "config.json"
    values = {**json.loads(config.read_text()), "model_type": "x", "auto_map": classes}
    config.write_text(json.dumps(values))
    tokenizer = {"tokenizer_class": "XTokenizer", "auto_map": classes}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    yield directory
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_with_code_is_refused(repository):
    with pytest.raises(DataError, match="needs Python code from its repository, which is never"):
        load_tokenizer(str(repository))


def test_a_model_with_code_is_refused(repository):
    from transformers import AutoModelForCausalLM

    from megatron_idpo.evaluate.hf_model import load_hf_model

    with pytest.raises(CheckpointError, match="Python code from its repository, which is never"):
        load_hf_model(AutoModelForCausalLM, str(repository), location="x", remedy="y")


def test_a_configuration_with_code_is_refused(repository):
    from megatron_idpo.evaluate.generate.models import _text_config

    with pytest.raises(UserError, match="Python code from its repository, which is never run"):
        _text_config(repository, "model.path")
