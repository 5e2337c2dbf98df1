"""What is published: the card, names of base models, and uploads to a stand-in of the hub."""

import re
from typing import Any

import pytest
from huggingface_hub import ModelCard

from megatron_idpo.cli.train import OPTIONAL, REQUIRED
from megatron_idpo.config.load import load_config
from megatron_idpo.config.objective import LOSSES
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import CheckpointError, ConfigError
from megatron_idpo.train import citations
from megatron_idpo.train.hub import _push, create_repository
from megatron_idpo.train.model_card import model_card, public_base_model

from .fake_hub import running_hub
from .tiny_run import LORA, Files, write_config

METRICS = {
    "eval_loss": 0.61,
    "eval_layer_3/loss": 0.64,
    "eval_rewards/accuracies": 0.925,
    "eval_rewards/margins": 0.25,
    "eval_pairs": 40.0,
}


@pytest.fixture
def config(tmp_path):
    def make(**sections: Any) -> RunConfig:
        file = write_config(Files(tmp_path), tmp_path / "run", **sections)
        return load_config(file, required=REQUIRED, optional=OPTIONAL)

    return make


def test_card_has_metadata_figures_and_no_path_of_this_machine(config, tmp_path):
    run = config(
        lora=LORA,
        data={"train": ["org/preferences", str(tmp_path / "private.jsonl")]},
        export={"base_model": "org/base", "license": "apache-2.0", "push_to_hub": "me/aligned"},
    )
    for kind, library in (("model", "transformers"), ("adapter", "peft")):
        card = ModelCard(model_card(run, "org/base", kind, METRICS))
        data = card.data.to_dict()
        assert data["base_model"] == "org/base" and data["license"] == "apache-2.0"
        assert data["datasets"] == ["org/preferences"] and data["library_name"] == library
        assert "intermediate-dpo" in data["tags"]
        for text in (
            "| reward accuracy | 0.93 (95 % interval 0.80 to 0.97) |",
            "| loss at layer 3 | 0.6400 |",
            "| data | org/preferences, local files |",
            "| trained | LoRA rank 4, α = 8, dropout 0, q_proj, ",
            "2408.02923",
            "me/aligned" if kind == "model" else '"me/aligned-adapter")',
        ):
            assert text in card.text
        assert str(tmp_path) not in str(card)


def test_card_of_unknown_license_and_without_held_out_pairs(config):
    card = model_card(
        config(objective={"layers": [], "intermediate_weight": 0.0}), "../../model", "model", {}
    )
    assert "None were held out." in card and "Fill in `license`" in card
    assert "license:" not in card and "base_model:" not in card and "2408.02923" not in card


def test_card_names_depth_seeds_and_a_local_base_model(config):
    card = model_card(
        config(objective={"layers": [0.5, 3]}, training={"seed": 7, "epochs": 1}),
        "../../model",
        "model",
        METRICS,
    )
    assert "| tapped layers | depth 0.5, 3, weight" in card
    assert "1 epoch" in card and "1 epochs" not in card and "| seeds | training 7, data" in card
    assert "a local directory, `../../model`; write its name on the hub" in card


def test_card_lists_every_setting_that_changes_the_method(config, tmp_path):
    run = config(
        objective={
            "loss": ["exo_pair", "bco_pair"],
            "loss_weights": [1.0, 0.5],
            "label_smoothing": 0.01,
            "wpo": True,
            "nll_weight": 0.2,
            "layer_weights": [1.0, 2.0],
            "reference_layer": "final",
        },
        reference={"source": "none"},
        lora={**LORA, "rslora": True, "adapter": str(tmp_path)},
        optimizer={"warmup_steps": 0, "warmup_fraction": 0.1, "weight_decay": 0.05},
    )
    card = model_card(run, "org/base", "model", METRICS)
    for name, value in {
        "objective.loss_weights": "1, 0.5",
        "objective.label_smoothing": "0.01",
        "objective.wpo": "true",
        "objective.nll_weight": "0.2",
        "objective.layer_weights": "1, 2",
        "objective.reference_layer": "final",
        "reference.source": "none",
        "lora.rslora": "true",
        "optimizer.warmup_fraction": "0.1",
        "optimizer.weight_decay": "0.05",
    }.items():
        assert f"| `{name}` | {value} |" in card
    assert ", from an adapter trained before |" in card and str(tmp_path) not in card
    assert "Rewards are log-probabilities times β: there was no reference." in card
    # DPO, intermediate, EXO, BCO, MPO, WPO, RPO, LoRA
    numbers = re.findall(r"eprint={([\d.]+)}", card)
    expected = ["2305.18290", "2408.02923", "2402.00856", "2404.04656"]
    assert numbers == [*expected, "2411.10442", "2406.11827", "2404.19733", "2106.09685"]


def test_every_loss_of_a_paper_is_cited():
    variants_of_dpo = {"sigmoid", "sigmoid_norm", "sft"}
    assert set(citations.LOSSES) == set(LOSSES) - variants_of_dpo


def test_card_uses_a_model_without_chat_template_with_text(config):
    chat, text = (
        model_card(config(), "org/base", "model", METRICS, has_chat_template=has_template)
        for has_template in (True, False)
    )
    assert 'prompt = [{"role": "user"' in chat and '[0]["generated_text"][-1]["content"])' in chat
    assert 'prompt = "The sky' in text and '[0]["generated_text"])' in text and "role" not in text


def test_hub_data_sets_are_named_with_split_and_weight(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs").mkdir()
    sources = [
        {"path": "org/data-v1.5", "split": "train_prefs", "weight": 2.0},
        "squad",
        "pairs",
        "data/*.jsonl",
        "gone.parquet",
    ]
    card = ModelCard(model_card(config(data={"train": sources}), "org/base", "model", METRICS))
    assert card.data.to_dict()["datasets"] == ["org/data-v1.5", "squad"]
    text = "| data | org/data-v1.5 (weight 2, split train_prefs), squad, local files |"
    assert text in card.text


def test_card_of_a_stepwise_result_describes_all_steps(config):
    steps = [{}, {"lr": 5e-3, "layers": [2]}, {"beta": 0.5}]
    run = config(
        objective={"layers": [], "intermediate_weight": 0.0},
        sdpo={"steps": steps, "order": "random"},
        training={"seed": 7},
        lora=LORA,
        export={"push_to_hub": "me/aligned"},
    )
    card = ModelCard(model_card(run, "org/base", "model", METRICS))
    assert {"intermediate-dpo", "sdpo"} <= set(card.data.to_dict()["tags"])
    for text in (
        "# aligned\n",
        "Aligned with stepwise intermediate DPO",
        "| steps | 3 of 3, pairs split at random; each starts from the result of the step before",
        "| step 2 | lr 0.005, layers 2 |",
        "| step 3 | beta 0.5 |",
        "| seeds | training 7 to 9 in the steps, data",
        "Rewards are relative to the base model",
        "| reward margin (β = 0.5) | +0.250 |",
        "2403.19270",
        "2408.02923",
    ):
        assert text in card.text
    assert '"me/aligned"' in card.text
    first = model_card(run, "org/base", "model", METRICS, step=1)
    assert '"path/to/this/directory"' in first, "single steps are not uploaded"
    assert (
        "# aligned, step 1\n" in first and "| steps | 1 of 3" in first and "| step 2 |" not in first
    )
    assert "Aligned with stepwise DPO" in first and "2408.02923" not in first


QWEN = """---
license: other
license_name: qwen-research
license_link: LICENSE
---
# Base
"""


def test_license_of_a_local_base_model_is_inherited(config, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text(QWEN)
    data = ModelCard(model_card(config(), "../../model", "model", METRICS)).data.to_dict()
    assert data["license"] == "other" and data["license_name"] == "qwen-research"
    assert data["license_link"] == "LICENSE"
    mit = config(export={"license": "mit"})
    data = ModelCard(model_card(mit, "../../model", "model", METRICS)).data.to_dict()
    assert data["license"] == "mit" and "license_name" not in data and "license_link" not in data


def test_license_of_a_hub_model_is_inherited(config, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--org--base" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text(QWEN)
    (refs := snapshot.parents[1] / "refs").mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    run = config(model={"path": "org/base"})
    assert "license_name: qwen-research" in model_card(run, "org/base", "model", METRICS)


def test_unreadable_card_of_the_base_model_is_reported(config, tmp_path, caplog):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("---\nlicense: [\n---\n# Base\n")
    assert "Fill in `license`" in model_card(config(), "../../model", "model", METRICS)
    assert "cannot be read, so its license is unknown" in caplog.text


@pytest.mark.parametrize(
    ("export", "problem"),
    [
        ({"license": "Apache 2.0"}, r"is 'Apache 2.0'; did you mean `apache-2.0`\? For a license"),
        ({"license": "my own"}, r"no such identifier; for a license .* set other"),
        ({"license": "other"}, r"export.license_name .*for which the hub needs a name; set it"),
        ({"license": "mit", "license_link": "LICENSE"}, "license_link .*has no effect"),
    ],
)
def test_licenses_that_the_hub_refuses(config, export, problem):
    with pytest.raises(ConfigError, match=problem):
        config(export=export)


def test_base_model_is_never_an_absolute_path(tmp_path):
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "abc"
    for directory in (tmp_path / "base", snapshot):
        directory.mkdir(parents=True)
    target = tmp_path / "runs" / "one" / "adapter"
    assert public_base_model(str(tmp_path / "base"), None, target) == "../../../base"
    assert public_base_model(str(snapshot), None, target) == "org/name"
    assert public_base_model("org/name", None, target) == "org/name"
    assert public_base_model(str(tmp_path / "base"), "org/name", target) == "org/name"


def test_export_settings_without_an_export_are_refused(config):
    with pytest.raises(ConfigError, match=r"export \(.*has no effect: training.export is false"):
        config(training={"export": False}, export={"dtype": "bf16"})
    with pytest.raises(ConfigError, match=r"push_to_hub.*is name; write organization/name"):
        config(export={"push_to_hub": "name"})


def test_adapter_that_nobody_can_load_is_not_published(config, tmp_path):
    (tmp_path / "model").mkdir()
    export: dict[str, Any] = {"push_to_hub": "me/aligned"}
    with pytest.raises(ConfigError, match=r"export.base_model.*model is a directory of this mach"):
        config(lora=LORA, export=export)
    config(export=export)  # without an adapter
    config(lora=LORA, export={**export, "base_model": "org/base"})
    config(lora=LORA, export=export, model={"path": "org/base"})
    # The result of step 2 is a merged model.
    config(lora=LORA, export=export, sdpo={"steps": [{}, {}]}, reference={"source": "cache"})


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    with running_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield hub


def test_upload_to_a_stand_in_of_the_hub(tmp_path, hub):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Model\n")
    _push("me/aligned", tmp_path, private=True)
    assert hub.private == {"me/aligned": True}
    assert hub.files["me/aligned"]["config.json"] == b"{}"
    assert set(hub.files["me/aligned"]) == {"config.json", "README.md"}
    hub.refuses = True
    with pytest.raises(CheckpointError, match=r"cannot be uploaded: .*401.*; .*hf auth login"):
        _push("me/aligned", tmp_path, private=True)


def test_repository_that_cannot_be_written_is_found_before_training(hub):
    create_repository("me/aligned", private=False)
    assert hub.private == {"me/aligned": False}
    hub.is_read_only = True
    with pytest.raises(CheckpointError, match=r"aligned: cannot be written: .*403.*hf auth login"):
        create_repository("me/aligned", private=False)
    hub.refuses = True
    with pytest.raises(CheckpointError, match=r"me/new: cannot be written: .*401"):
        create_repository("me/new", private=False)
