"""Names of TRL, PEFT and Transformers get a hint at our field."""

import re
from pathlib import Path

import pytest

from megatron_idpo.config.load import _fields_by_name, load_config
from megatron_idpo.config.other_names import OTHER_NAMES
from megatron_idpo.config.run_config import SECTIONS, RunConfig
from megatron_idpo.config.section import section_class
from megatron_idpo.errors import ConfigError

from .helper import load, problems_of


@pytest.mark.parametrize(
    ("section", "field", "hint"),
    [
        ("training", "batch_size", "set training.global_batch_pairs"),
        ("training", "learning_rate", "set optimizer.lr"),
        ("optimizer", "learning_rate", "set optimizer.lr"),
        ("lora", "r", "set lora.rank"),
        ("lora", "lora_alpha", "set lora.alpha"),
        ("lora", "target_modules", "set lora.targets"),
        ("training", "per_device_train_batch_size", "set training.global_batch_pairs"),
        ("training", "gradient_accumulation_steps", "set training.global_batch_pairs"),
        ("data", "max_prompt_length", "set data.max_length"),
        ("training", "num_train_epochs", "set training.epochs"),
        ("training", "output_dir", "set training.output"),
        ("training", "gradient_checkpointing", "set training.recompute to full"),
        ("training", "bf16", "set model.dtype to bf16"),
        ("training", "report_to", "set logging.tensorboard"),
        ("training", "save_steps", "set checkpoint.every_steps"),
        ("objective", "loss_type", "set objective.loss"),
        ("objective", "reference_free", "set reference.source to none"),
        ("model", "model_name_or_path", "set model.path"),
        # Ours, in another section or with a typing error.
        ("training", "lr", "did you mean `optimizer.lr`"),
        ("objective", "bta", "did you mean `beta`"),
    ],
)
def test_a_field_of_another_library_is_translated(tmp_path, section, field, hint):
    messages = problems_of(tmp_path, **{section: {field: 1}})
    (message,) = [one for one in messages if one.startswith(f"{section}.{field} (run.yaml:")]
    assert f"unknown field; {hint}" in message


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("learning_rate", "set optimizer.lr"),
        ("output_dir", "set training.output"),
        ("beta", "did you mean `objective.beta`"),
        ("optimiser", "did you mean `optimizer`"),
    ],
)
def test_a_field_at_the_top_level_gets_its_section(tmp_path, name, hint):
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: m}}\n{name}: 1\n")
    with pytest.raises(ConfigError, match=f"{name} \\(.*unknown section; {hint}"):
        load_config(file)


def test_hints_name_fields_that_exist_and_translate_no_field_of_ours():
    fields = {
        f"{section}.{name}"
        for section, info in RunConfig.model_fields.items()
        for name in section_class(info).model_fields
    }
    for name, hint in OTHER_NAMES.items():
        named = re.findall(r"\b(?:set|add|and|or|of) ((?:[a-z]+)\.[a-z_0-9]+)", hint)
        assert set(named) <= fields, name
    # `h4.batch_size` is ours; elsewhere training's is meant.
    assert set(OTHER_NAMES) & set(_fields_by_name()) == {"batch_size"}


def test_columns_of_all_sources(tmp_path):
    config = load(tmp_path, data={"train": "a.jsonl", "columns": {"prompt": "question"}})
    assert config.data.columns.prompt == "question"
    assert not config.data.train[0].has_columns


def test_the_table_of_the_docs_shows_what_is_printed(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    section = page.partition("## Names of other libraries")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(.+?)` \| (.+) \|$", section, re.M)
    assert len(rows) == 20
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: m}\nobjective: {layers: []}\n")
    for override, answer in rows:
        with pytest.raises(ConfigError) as raised:
            load_config(file, [override], optional=SECTIONS)
        assert f"(command line): {answer}" in str(raised.value)
