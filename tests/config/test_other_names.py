"""Names and values of other programs get a hint that leads to the same training."""

import re
from pathlib import Path

import pytest

from megatron_idpo.config import other_names
from megatron_idpo.config.data import SourceConfig
from megatron_idpo.config.load import fields_by_name, load_config
from megatron_idpo.config.other_names import OTHER_NAMES
from megatron_idpo.config.other_values import OTHER_VALUES
from megatron_idpo.config.run_config import SECTIONS, RunConfig
from megatron_idpo.config.sdpo import SdpoStepConfig
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
        ("model", "base_model", "set model.path"),
        ("data", "cutoff_len", "set data.max_length"),
        ("data", "val_size", "set data.eval_fraction"),
        ("data", "streaming", "leave it out"),
        ("data", "train_split", "set data.train to {path, split}"),
        ("lora", "lora_rank", "set lora.rank"),
        ("lora", "use_dora", "leave it out; only plain LoRA"),
        ("lora", "modules_to_save", "leave it out; modules other than"),
        ("layout", "tp", "set layout.tensor"),
        ("layout", "tensor_parallel", "set layout.tensor"),
        ("layout", "dp", "leave it out; data parallelism is what is left"),
        ("layout", "data", "leave it out; data parallelism is what is left"),
        ("layout", "sequence_parallel_size", "set layout.context"),
        ("layout", "expert_model_parallel_size", "set layout.expert"),
        ("optimizer", "betas", "set optimizer.beta1 and optimizer.beta2"),
        ("optimizer", "warmup", "set optimizer.warmup_fraction, or optimizer.warmup_steps"),
        ("objective", "pref_beta", "set objective.beta"),
        ("objective", "simpo_gamma", "leave it out; SimPO"),
        ("export", "hub_model_id", "set export.push_to_hub"),
        ("reference", "model", "leave it out; the reference is model.path"),
        ("training", "fp16", "leave it out; training in fp16 is refused"),
        # The same name in two places
        ("generate", "batch_size", "set generate.batch_prompts"),
        ("training", "optimizer", "did you mean the section `optimizer`?"),
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
        ("seed", "did you mean `data.seed` or `training.seed` or `evaluate.seed`"),
        ("base_model", "set model.path"),
        ("batch_size", "set training.global_batch_pairs"),
        ("adapter", "set lora.adapter to an adapter to start from; for new ones add"),
        ("dpo", "write its fields in the section objective"),
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
    hints = [*OTHER_NAMES.items()]
    hints += [(name, hint) for values in OTHER_VALUES.values() for name, hint in values.items()]
    for name, hint in hints:
        text = hint.replace("config.json", "").replace("curves.png", "")
        named = set(re.findall(r"\b[a-z]\w+\.[a-z_0-9]+\b", re.sub(r"docs/\w+\.md", "", text)))
        assert named <= fields, name
    assert {place.partition(".")[0] for place in OTHER_VALUES} <= set(SECTIONS)
    assert {place for place in OTHER_VALUES if "." in place} <= fields
    # Ours in one section, here for the others: h4.batch_size, export.base_model, lora.adapter,
    # data.eval, sdpo.steps, logging.wandb, judge.template, model.tokenizer.
    ours = {"batch_size", "base_model", "adapter", "eval", "steps", "wandb", "template"}
    ours |= {"tokenizer"}
    assert set(OTHER_NAMES) & set(fields_by_name()) == ours


def test_no_name_has_two_hints():
    names = [name for names in other_names._NAMES.values() for name in names.split()]
    assert sorted(names) == sorted(OTHER_NAMES)


def test_names_for_one_place_name_a_field_that_is_not_there():
    """A misspelt section in the table would never be looked up."""
    places = {section: section_class(info) for section, info in RunConfig.model_fields.items()}
    places |= {"source": SourceConfig, "sdpostep": SdpoStepConfig}
    for name in OTHER_NAMES:
        section, dot, field = name.partition(".")
        if dot:
            assert field not in places[section].model_fields, name


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("objective.loss=dpo", "is 'dpo'; use sigmoid, which is DPO"),
        ("objective.loss=DPO", "is 'DPO'; use sigmoid, which is DPO"),
        ("objective.loss=IPO", "is 'IPO'; did you mean `ipo`?"),
        ("objective.loss=sigmod", "is 'sigmod'; did you mean `sigmoid`?"),
        ("objective.loss=simpo", "SimPO (no reference, a target margin) is not supported"),
        ("objective.loss=kto_pair", "KTO is not supported"),
        ("objective.loss=[sigmoid, orpo]", "ORPO is not supported"),
        ("objective.loss=cdpo", "use sigmoid, and set objective.label_smoothing"),
        ("objective.loss=aot_pair", "use aot_unpaired"),
        ("objective.loss=bco_unpaired", "the values are sigmoid, "),
        ("export.push_to_hub=true", "is True; write organization/name"),
        ("logging.wandb=mine", "is 'mine'; write {project: mine}"),
        ("logging.wandb=true", "is True; write {project: NAME}"),
        ("training.max_steps=-1", "is -1; write null"),
        ("training.epochs=3.0", "is 3.0; write a whole number"),
        ("training.recompute=true", "is True; use full"),
        ("training.eval_every_steps=0.1", "is 0.1; write a number of steps, not a share"),
        ("optimizer.warmup_steps=0.1", "is 0.1; set optimizer.warmup_fraction"),
        ("optimizer.schedule=constant_with_warmup", "use constant, with optimizer.warmup_steps"),
        ("optimizer.schedule=polynomial", "it is not supported: use cosine, linear or constant"),
        ("data.truncation=keep_end", "it is not supported: a prompt is not cut off"),
        ("data.eval_fraction=0", "is 0; leave it out"),
        ("data.eval_fraction=200", "is 200; set data.eval_pairs"),
        ("model.dtype=bfloat16", "is 'bfloat16'; use bf16"),
        ("model.dtype=float16", "training in fp16 is refused"),
        ("lora.targets=all", "is 'all'; use all-linear"),
        ("lora.targets=[q_proj, lm_head]", "adapters of the embedding and the head are not"),
        ("checkpoint.resume=true", "is True; use auto"),
        ("sdpo.steps=2", "is 2; write a list with one mapping per step"),
        ("sdpo.steps=[{learning_rate: 1e-5}]", "unknown field; set lr"),
        ("data.train=[{path: a, type: chat}]", "unknown field; leave it out; the format is"),
        ("optimizer=adamw_8bit", "the optimizer is AdamW: set optimizer.lr"),
        ("model=org/name", "set model.path"),
    ],
)
def test_a_value_of_another_library_gets_a_remedy(tmp_path, override, hint):
    sections = {
        "model": {"path": "m"},
        "data": {"train": "t"},
        "optimizer": {"lr": 1e-4},
        "training": {"output": "o"},
    }
    (message,) = problems_of(tmp_path, [override], **sections)
    assert f"(command line): {hint}" in message or f"; {hint}" in message


BASE = "{model: {path: m}, data: {train: t}, optimizer: {lr: 1e-4}, training: {output: o}}"


def _is_valid(tmp_path, *overrides):
    file = tmp_path / "run.yaml"
    file.write_text(BASE)
    try:
        load_config(file, overrides, optional=SECTIONS)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("place", [place for place in OTHER_VALUES if "." in place])
def test_recommended_values_are_valid_and_translated_ones_are_not(tmp_path, place):
    """A hint must not end in another error; a valid value would never be looked up."""
    for value, hint in OTHER_VALUES[place].items():
        if recommended := re.match(r"(?:use|write) (\[.*?\]|null|\w+(?:-linear)?)", hint):
            needed = ["objective.label_smoothing=0.001"] if "exo_pair" in hint else []
            words = {"a", "how", "organization", "whole"}  # "write a number of steps"
            if recommended[1] not in words:
                assert _is_valid(tmp_path, f"{place}={recommended[1]}", *needed), (value, hint)
        if not value.startswith("<"):
            assert not _is_valid(tmp_path, f"{place}={value}"), value


AXOLOTL = """
base_model: org/name
load_in_4bit: true
datasets: [{path: org/pairs, type: chat_template.default}]
val_set_size: 0.05
output_dir: out
adapter: lora
sequence_len: 2048
sample_packing: false
lora_r: 32
lora_target_linear: true
rl: dpo
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
bf16: auto
flash_attention: true
wandb_project: mine
special_tokens: {}
"""

LLAMA_FACTORY = """
model_name_or_path: org/name
trust_remote_code: true
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
pref_loss: sigmoid
dataset: dpo_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 1
ddp_timeout: 180000000
val_size: 0.1
"""


@pytest.mark.parametrize("text", [AXOLOTL, LLAMA_FACTORY], ids=["axolotl", "llama-factory"])
def test_every_name_of_a_whole_file_has_its_own_remedy(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_config(file, optional=SECTIONS)
    assert len(raised.value.problems) == len(text.strip().splitlines())
    assert "the sections are" not in str(raised.value)


def test_a_list_of_names_is_printed_once(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("xxyy: 1\nyyzz: 1\n")
    with pytest.raises(ConfigError) as raised:
        load_config(file, optional=SECTIONS)
    assert str(raised.value).count("the sections are model, data") == 1
    assert "yyzz (run.yaml:2): unknown section; as above" in str(raised.value)
    # Who reads the problems one by one gets each remedy.
    assert all("the sections are" in problem.remedy for problem in raised.value.problems)


def test_columns_of_all_sources(tmp_path):
    config = load(tmp_path, data={"train": "a.jsonl", "columns": {"prompt": "question"}})
    assert config.data.columns.prompt == "question"
    assert not config.data.train[0].has_columns


def test_the_table_of_the_docs_shows_what_is_printed(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    section = page.partition("## Names of other libraries")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(.+?)` \| (.+) \|$", section, re.M)
    assert len(rows) == 25
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: m}\nobjective: {layers: []}\n")
    for override, answer in rows:
        with pytest.raises(ConfigError) as raised:
            load_config(file, [override], optional=SECTIONS)
        assert f"(command line): {answer}" in str(raised.value)
