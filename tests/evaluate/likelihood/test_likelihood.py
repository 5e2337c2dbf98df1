"""Layer curves of tiny models: equal to the oracle in each layout, cached, resumed."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_idpo.errors import EXIT_PREEMPTED, ConfigError
from megatron_idpo.evaluate.likelihood.curves_file import read_curves, read_settings
from megatron_idpo.evaluate.likelihood.layer_curves import LayerCurves
from megatron_idpo.reference.logps_table import read_table
from megatron_idpo.testing import write_tiny_hf_model
from tests.oracle import sequence_logps
from tests.train.tiny_run import NUM_LAYERS, PAIRS, SIZES

from .tiny_evaluation import BETA, Models, evaluation_config, likelihood

TOLERANCE = 1e-4
"""Absolute, of every quantity."""

LAYERS = tuple(range(1, NUM_LAYERS + 1))
LAYOUTS = {
    "single": {},
    "TP2": {"tensor": 2},
    "TP2 SP": {"tensor": 2, "sequence_parallel": True},
    "PP2": {"pipeline": 2},
    "DP2": {},
    "CP2": {"context": 2},
}
SELECTED = ("TP2 SP", "DP2")
"""`tests/reference` scores in layouts with pipeline stages."""


def curves_of(output: Path) -> dict[str, LayerCurves]:
    return {model.model: model for model in read_curves(output / "likelihood" / "likelihood.csv")}


@pytest.fixture(scope="module")
def expected(models: Models) -> dict[str, NDArray[np.float64]]:
    """Every quantity of the other model at every layer, computed step by step."""
    pairs = tokens_of(models)
    policy, reference = (
        logps_PL2(path, pairs).astype(np.float64) for path in (models.other, models.files.model)
    )
    delta_PL = BETA * np.subtract(*np.moveaxis(policy - reference, 2, 0))
    sizes_P2 = np.array([[len(chosen), len(rejected)] for _, chosen, rejected in pairs])
    own_PL = np.subtract(*np.moveaxis(policy / sizes_P2[:, None], 2, 0))
    return {
        "likelihood": (1 / (1 + np.exp(-delta_PL))).mean(0),
        "margin": delta_PL.mean(0),
        "accuracy": (delta_PL > 0).mean(0),
        "own_accuracy": (own_PL > 0).mean(0),
        "agreement": np.array([np.corrcoef(x_P, own_PL[:, -1])[0, 1] for x_P in own_PL.T]),
        "nats_per_token": -policy.sum((0, 2)) / sizes_P2.sum(),
    }


def tokens_of(models: Models) -> list[tuple[list[int], list[int], list[int]]]:
    """Tokens of prompt, chosen and rejected answer; answers end with EOS."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.files.model)
    records = [json.loads(line) for line in models.pairs.read_text().splitlines()]

    def encoded(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    pairs = []
    for record in records:
        prompt = encoded(record["prompt"])
        answers = [
            [*encoded(record["prompt"] + record[side])[len(prompt) :], tokenizer.eos_token_id]
            for side in ("chosen", "rejected")
        ]
        pairs.append((prompt, answers[0], answers[1]))
    return pairs


def logps_PL2(path: Path, pairs: Any) -> NDArray[np.float32]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        by_layer = sequence_logps(model, pairs, LAYERS, sequences_per_forward=1)
    found = torch.stack([by_layer[layer] for layer in LAYERS]).view(NUM_LAYERS, -1, 2)
    return found.permute(1, 0, 2).numpy()


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=[] if name in SELECTED else pytest.mark.exhaustive)
        for name in LAYOUTS
    ],
)
def test_curves_equal_the_oracle(
    layout: str, models: Models, expected: dict[str, Any], workers: Any, tmp_path: Path
) -> None:
    subjects = {"base": str(models.files.model), "other": str(models.other)}
    file = evaluation_config(models, tmp_path / "out", subjects, layout=LAYOUTS[layout])
    outcomes = workers.run(likelihood, 1 if layout == "single" else 2, file, figures=True)
    assert [code for code, _ in outcomes] == [0] * len(outcomes)
    curves = curves_of(tmp_path / "out")
    other = curves["other"]
    assert (other.layers, other.pairs, other.prompts) == (LAYERS, PAIRS, PAIRS // 2)
    for name, expected_L in expected.items():
        found = other.estimates[name]
        np.testing.assert_allclose(found.value_L, expected_L, rtol=0, atol=TOLERANCE, err_msg=name)
        assert np.ptp(expected_L) > 20 * TOLERANCE, f"{name}: layers must differ"
    made_of = read_settings(tmp_path / "out" / "likelihood")
    assert made_of["readings"]["base"] == made_of["readings"]["the reference"]
    kept = tmp_path / "out" / "likelihood" / made_of["readings"]["other"] / "reference.parquet"
    assert read_table(kept, LAYERS).shape == (PAIRS, NUM_LAYERS, 2)
    assert curves["base"].is_reference
    assert (curves["base"].estimates["accuracy"].value_L == 0.5).all()
    printed = outcomes[0][1]
    for path in ("likelihood.csv", "likelihood.png", "advice.md"):
        assert str(tmp_path / "out" / "likelihood" / path) in printed.replace("\n", "")
        assert (tmp_path / "out" / "likelihood" / path).stat().st_size > 100


@pytest.mark.distributed
def test_model_is_scored_again_only_when_it_changes(
    models: Models, workers: Any, tmp_path: Path
) -> None:
    copy = shutil.copytree(models.other, tmp_path / "copy")
    subjects = {"base": str(models.files.model), "one": str(models.other), "two": str(copy)}
    output = tmp_path / "out"
    file = evaluation_config(models, output, subjects)
    workers.run(likelihood, 1, file)
    readings = {path.name for path in (output / "likelihood" / "logps").iterdir()}
    assert len(readings) == 2, "one of the reference, one of both copies"
    before = curves_of(output)
    assert [code for code, _ in workers.run(likelihood, 1, file, blind=True)] == [0]
    # Another beta changes the curves, not the log-probabilities.
    workers.run(likelihood, 1, file, ["objective.beta=0.6"], blind=True)
    doubled = curves_of(output)["one"].estimates["margin"].value_L
    np.testing.assert_allclose(doubled, 2 * before["one"].estimates["margin"].value_L, rtol=1e-6)

    write_tiny_hf_model(copy, "llama", seed=8, **SIZES)
    workers.run(likelihood, 1, file)
    after = curves_of(output)
    for name, is_same in (("one", True), ("two", False)):
        margins = [curves[name].estimates["margin"].value_L for curves in (before, after)]
        assert (margins[0] == margins[1]).all() == is_same, name


@pytest.fixture(scope="module")
def uninterrupted(
    models: Models, workers: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """Files of a run that was not stopped."""
    output = tmp_path_factory.mktemp("uninterrupted")
    workers.run(likelihood, 1, evaluation_config(models, output, {"other": str(models.other)}))
    return {path.name: path.read_bytes() for path in (output / "likelihood").glob("*.csv")}


@pytest.mark.distributed
@pytest.mark.parametrize("stop_after", [6, PAIRS], ids=["within a model", "at the end of a model"])
def test_stopped_run_resumes(
    stop_after: int, models: Models, workers: Any, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    file = evaluation_config(models, tmp_path / "out", {"other": str(models.other)})
    [(code, printed)] = workers.run(likelihood, 1, file, stop_after=stop_after)
    assert code == EXIT_PREEMPTED and "the same command resumes" in printed
    assert len(list((tmp_path / "out" / "likelihood" / "logps").iterdir())) == 1, "the reference"
    assert not (tmp_path / "out" / "likelihood" / "likelihood.csv").exists()
    assert workers.run(likelihood, 1, file)[0][0] == 0
    csv = tmp_path / "out" / "likelihood" / "likelihood.csv"
    assert csv.read_bytes() == uninterrupted[csv.name]


@pytest.mark.distributed
def test_adapter_equals_the_merged_model(models: Models, workers: Any, tmp_path: Path) -> None:
    """Compared with the model that PEFT merged."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(models.files.model, dtype=torch.float32)
    adapted = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    subjects = {
        "adapter": {"path": str(models.files.model), "adapter": str(tmp_path / "adapter")},
        "merged": str(tmp_path / "merged"),
    }
    file = evaluation_config(models, tmp_path / "out", subjects)
    assert workers.run(likelihood, 1, file)[0][0] == 0
    curves = curves_of(tmp_path / "out")
    one, other = (curves[name].estimates["margin"].value_L for name in subjects)
    np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE)
    assert np.abs(one).max() > 20 * TOLERANCE


def test_all_incompatible_models_are_reported(models: Models, workers: Any, tmp_path: Path) -> None:
    deeper, retokenised = tmp_path / "deeper", tmp_path / "retokenised"
    write_tiny_hf_model(deeper, "llama", seed=1, **{**SIZES, "num_hidden_layers": 6})
    shutil.copytree(models.other, retokenised)
    tokenizer = retokenised / "tokenizer.json"
    settings = json.loads(tokenizer.read_text())
    settings["pre_tokenizer"]["add_prefix_space"] = True
    tokenizer.write_text(json.dumps(settings))
    subjects = {"deeper": str(deeper), "retokenised": str(retokenised)}
    file = evaluation_config(models, tmp_path / "out", subjects)
    with pytest.raises(ConfigError) as caught:
        likelihood(file)
    message = str(caught.value)
    assert "evaluate.models.deeper: has num_layers 6, the reference 4" in message
    assert "another tokenizer than model.path" in message


def test_missing_held_out_pairs_are_reported(models: Models, tmp_path: Path) -> None:
    file = evaluation_config(models, tmp_path / "out", {"other": str(models.other)})
    with pytest.raises(ConfigError, match=r"data\.eval: there are no held-out pairs"):
        likelihood(file, ["data.eval=null"])


@pytest.mark.distributed
def test_equal_weights_are_ties_in_another_layout(
    models: Models, workers: Any, tmp_path: Path
) -> None:
    """Scored with TP2 under another identity: margins are rounding, accuracies are ties."""
    copy = shutil.copytree(models.files.model, tmp_path / "copy")
    config = copy / "config.json"
    config.write_text(config.read_text() + "\n")
    base = evaluation_config(models, tmp_path / "out", {"base": str(models.files.model)})
    workers.run(likelihood, 1, base)
    file = evaluation_config(models, tmp_path / "out", {"copy": str(copy)}, layout={"tensor": 2})
    assert [code for code, _ in workers.run(likelihood, 2, file)] == [0, 0]
    found = curves_of(tmp_path / "out")["copy"]
    assert found.is_reference
    assert (found.estimates["accuracy"].value_L == 0.5).all()
    assert (found.estimates["margin"].value_L != 0).any(), "no rounding difference"


def test_invalid_settings_are_reported_before_scoring(models: Models, tmp_path: Path) -> None:
    subject = {"path": str(models.other), "adapter": str(tmp_path / "nowhere")}
    file = evaluation_config(models, tmp_path / "out", {"a": subject})
    with pytest.raises(ConfigError, match=r"evaluate\.models\.a\.adapter: .*nowhere"):
        likelihood(file, blind=True)
    (tmp_path / "file").write_text("")
    fine = evaluation_config(models, tmp_path / "out", {"a": str(models.other)})
    output = f"evaluate.output={tmp_path / 'file' / 'out'}"
    with pytest.raises(ConfigError, match=r"evaluate\.output: cannot create .*: Not a directory"):
        likelihood(fine, [output], blind=True)


def test_cache_errors_name_the_evaluation_output() -> None:
    from megatron_idpo.errors import CheckpointError
    from megatron_idpo.evaluate.likelihood.run import _naming_the_output

    with (
        pytest.raises(CheckpointError, match=r"name another directory in evaluate\.output"),
        _naming_the_output(),
    ):
        remedy = "wait for it, or name another directory in reference.cache"
        raise CheckpointError.at("x", "is being written", remedy)
