"""Whole runs of a mixture of experts: resumed and exported in other layouts, LoRA, sDPO."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_idpo.config.lora import EXPERT_PARAMETERS
from megatron_idpo.errors import EXIT_PREEMPTED
from megatron_idpo.lora.adapter_config import WEIGHTS_NAME
from megatron_idpo.testing import write_tiny_hf_model
from megatron_idpo.train.metrics.file import read_metrics
from tests.sdpo.stepped_run import states, stepped_config

from .run_hooks import compiled_ahead, stop_after
from .tiny_run import LORA, SIZES, exported, relative_difference, run, write_config, write_files

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
"""Between layouts, as in `test_loop.py`."""

ADAPTER_TOLERANCE = 1e-4
"""B is small at first, and Adam's steps are large relative to it."""

EP2 = {"expert": 2}
EP2_CP2 = {"expert": 2, "context": 2}
EP2_TP2 = {"expert": 2, "tensor": 2, "expert_tensor": 1, "sequence_parallel": True}
EP2_PP2 = {"expert": 2, "pipeline": 2}
CACHED = {"reference": {"source": "cache"}, "objective": {"router_aux_loss": 0.01}}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Input files with a Mixtral of 4 experts."""
    files = write_files(tmp_path_factory.mktemp("experts"))
    write_tiny_hf_model(files.model, "mixtral", seed=2, **SIZES, num_local_experts=4)
    return files


def test_run_resumes_in_another_expert_layout(experts, workers, tmp_path):
    """The reference cache of the first layout is used in the second.

    Passes before the first step, as on a GPU, change no figure.
    """
    whole = tmp_path / "whole"
    workers.run(run, 1, write_config(experts, whole, **CACHED), compiled_ahead)
    for layout, hooks, code in ((EP2, (stop_after(4),), EXIT_PREEMPTED), (EP2_TP2, (), 0)):
        file = write_config(experts, tmp_path / "parts", layout=layout, **CACHED)
        outcomes = workers.run(run, 2, file, *hooks)
        assert [outcome.code for outcome in outcomes] == [code] * 2, outcomes[0].printed
    ours, theirs = (read_metrics(path / "metrics.jsonl") for path in (tmp_path / "parts", whole))
    for name in ("loss", "router/aux_loss", "grad_norm"):
        values = [[line[name] for line in lines if name in line] for lines in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=1e-4) and len(values[1]) == 8
    assert all(line["router/load_max"] >= 1 >= line["router/load_min"] for line in theirs)
    assert relative_difference(exported(tmp_path / "parts"), exported(whole)) <= TOLERANCE


def test_adapters_of_experts_resume_in_another_layout(experts, workers, tmp_path):
    """And PEFT's model with the adapter equals the merged model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = {"lora": {**LORA, "target_parameters": list(EXPERT_PARAMETERS)}}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    workers.run(run, 1, write_config(experts, whole, **settings))
    for layout, hooks, code in ((EP2_CP2, (stop_after(4),), EXIT_PREEMPTED), (EP2_TP2, (), 0)):
        file = write_config(experts, parts, layout=layout, **settings)
        outcomes = workers.run(run, 2, file, *hooks)
        assert [outcome.code for outcome in outcomes] == [code] * 2, outcomes[0].printed
    assert "o_proj, mlp.experts.gate_up_proj, mlp.experts.down_proj" in outcomes[0].printed
    ours, theirs = (load_file(path / "adapter" / WEIGHTS_NAME) for path in (parts, whole))
    assert relative_difference(ours, theirs) <= ADAPTER_TOLERANCE
    base, merged = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (experts.model, parts / "hf")
    )
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        before, after = base(tokens).logits, merged(tokens).logits
        adapted = PeftModel.from_pretrained(base, parts / "adapter")(tokens).logits
    assert (adapted - after).abs().max() <= 1e-4 < (after - before).abs().max() / 100


@pytest.mark.exhaustive
def test_adapters_are_on_the_attention_and_equal_the_merged_model(experts, workers, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    output = tmp_path / "run"
    outcomes = workers.run(run, 2, write_config(experts, output, layout=EP2, lora=LORA))
    assert "LoRA rank 4 on q_proj, k_proj, v_proj, o_proj" in outcomes[0].printed
    settings = json.loads((output / "adapter/adapter_config.json").read_text())
    assert settings["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    base, merged = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (experts.model, output / "hf")
    )
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, output / "adapter")(tokens).logits
        assert (adapted - merged(tokens).logits).abs().max() <= 1e-4


@pytest.mark.exhaustive
def test_sdpo_steps_may_have_different_expert_layouts(experts, workers, tmp_path):
    for name, layouts, processes in (("one", ({}, {}), 1), ("several", (EP2, EP2_PP2), 4)):
        steps = [{"fraction": 0.5, "layout": layout} for layout in layouts]
        file = stepped_config(experts, tmp_path / name, "full", steps)
        outcomes = workers.run(run, processes, file)
        assert outcomes[0].code == 0, outcomes[0].printed
        assert states(tmp_path / name) == ["complete", "complete"]
    difference = relative_difference(exported(tmp_path / "several"), exported(tmp_path / "one"))
    assert difference <= TOLERANCE
