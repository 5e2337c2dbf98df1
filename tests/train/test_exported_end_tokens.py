"""Exported models end answers where they were trained to end them, by every file of theirs."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.convert.hf_io.end_tokens import end_tokens
from megatron_idpo.convert.hf_io.reader import HfCheckpoint
from megatron_idpo.data.tokenize.tokenizers import load_tokenizer, read_template
from megatron_idpo.errors import CheckpointError
from megatron_idpo.train.export import _trained_companions, _with_tokenizer

EOS, TURN_END = 2, 1
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<s>\n{% endfor %}"
WITH_EOS = TEMPLATE + "{{ eos_token }}"


@dataclass(frozen=True)
class Case:
    """A base model, `data.chat_template`, and the expected files."""

    template: str | None
    """`data.chat_template`."""

    tokens: list[int]
    """In `generation_config.json` and `config.json`."""

    eos: str = "<s>"
    """In `tokenizer_config.json`."""

    base_eos: Any = EOS
    """In the base model's generation config; "missing" for none."""

    own_template: str | None = None
    """In the base model's `tokenizer_config.json`."""


CASES = {
    "template": Case(TEMPLATE, [EOS, TURN_END]),
    "template that replaces another": Case(TEMPLATE, [EOS, TURN_END], own_template="old"),
    "template file": Case("chat.jinja", [EOS, TURN_END]),
    "template that writes EOS in addition": Case(WITH_EOS, [EOS, TURN_END], eos="</s>"),
    "several end tokens": Case(TEMPLATE, [EOS, 7, TURN_END], base_eos=[EOS, 7]),
    "no generation config": Case(TEMPLATE, [EOS, TURN_END], base_eos="missing"),
    "no end token": Case(TEMPLATE, [EOS, TURN_END], base_eos=None),
    "the model's own template": Case(None, [EOS, TURN_END], eos="</s>", own_template=TEMPLATE),
    "text that ends with another EOS": Case(None, [7, EOS], eos="</s>", base_eos=7),
}


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def export(root: Path, tiny: Any, case: Case) -> Path:
    """The companion files of a trained model, in a directory."""
    base, target, scratch = root / "base", root / "hf", root / "scratch"
    shutil.copytree(tiny.model, base)
    for directory in (target, scratch):
        directory.mkdir()
    generation = base / "generation_config.json"
    if case.base_eos == "missing":
        generation.unlink()
    else:
        edit(generation, eos_token_id=case.base_eos)
        if not isinstance(case.base_eos, str):  # Transformers would refuse it.
            edit(base / "config.json", eos_token_id=case.base_eos)
    if case.own_template is not None:
        edit(base / "tokenizer_config.json", chat_template=case.own_template)
    template = case.template
    if template == "chat.jinja":
        template = str(root / template)
        Path(template).write_text(TEMPLATE)
    tokenizer = load_tokenizer(str(base), template)
    files = HfCheckpoint(base).companions
    for path in _trained_companions(files, scratch, tokenizer, read_template(template)):
        shutil.copy(path, target)
    return target


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_file_names_the_trained_end_token(case: Case, tiny: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    model = export(tmp_path, tiny, case)
    assert GenerationConfig.from_pretrained(model).eos_token_id == case.tokens
    assert AutoConfig.from_pretrained(model).eos_token_id == case.tokens
    assert end_tokens(model) == case.tokens
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.eos_token == case.eos
    if case.template is not None:
        expected = WITH_EOS if case.template == WITH_EOS else TEMPLATE
        settings = json.loads((model / "tokenizer_config.json").read_text())
        assert settings.get("chat_template", expected) == tokenizer.chat_template == expected


def test_the_new_eos_changes_no_token_of_a_conversation(tiny: Any, tmp_path: Path) -> None:
    before, after = (
        load_tokenizer(str(path), TEMPLATE)
        for path in (tiny.model, export(tmp_path, tiny, CASES["template"]))
    )
    assert after.eos_id == TURN_END != before.eos_id
    assert after.encoding_identity == before.encoding_identity
    assert after.vocabulary_identity != before.vocabulary_identity


def test_files_that_name_the_end_token_already_are_not_changed(tiny: Any, tmp_path: Path) -> None:
    case = Case(None, [EOS])
    model = export(tmp_path, tiny, case)
    for path in model.iterdir():
        assert path.read_bytes() == (tmp_path / "base" / path.name).read_bytes()


def test_a_template_without_an_end_token_is_reported(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As ChatML with a tokenizer that does not know `<|im_end|>`."""
    export(tmp_path, tiny, Case("{{ messages[-1].content }}<|im_end|>", [EOS]))
    assert "ends answers with '<|im_end|>', which is not a token" in caplog.text


def test_an_invalid_end_token_is_reported(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="eos_token_id is 'x', not token ids"):
        export(tmp_path, tiny, Case(TEMPLATE, [], base_eos="x"))


@pytest.mark.parametrize("kind", ["directory", "file", "hub"])
def test_the_configured_tokenizer_is_exported(
    kind: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model's own tokenizer gives texts other tokens than those that were trained."""
    other = tmp_path / "other"
    other.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json", "README.md"):
        (other / name).write_text(name)
    if kind == "file":
        (other / "tokenizer.model").rename(other / "sp.model")
    path = {"directory": str(other), "file": str(other / "sp.model"), "hub": "owner/name"}[kind]

    def cached(_: str, name: str) -> str | None:
        return str(other / name) if (other / name).is_file() else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    base = HfCheckpoint(tiny.model).companions
    files = {file.name: file for file in _with_tokenizer(base, path, tmp_path)}
    models = {"config.json", "generation_config.json"}
    assert files.keys() == models | {"tokenizer.model", "tokenizer_config.json"}
    assert all(files[name].read_text() == name for name in files.keys() - models)
    with pytest.raises(CheckpointError, match=r"model\.tokenizer .*gone: has no tokenizer files"):
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
        _with_tokenizer(base, str(tmp_path / "gone"), tmp_path)
