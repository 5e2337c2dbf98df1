"""LoRA on Transformer Engine's layers (a stand-in) against PEFT.

In the normal run they are compared with megatron-core's own layers: `tests/mcore/model`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_idpo.config.layout import Layout

from .lora_case import Case
from .peft_parity import assert_equals_peft

RUN = Path(__file__).with_name("transformer_engine_run.py")
CASES = [
    Case(model="llama-mha"),
    Case(model="qwen2", settings="k-o-up", recompute="full"),
    Case(model="qwen3", layout=Layout(tensor=2, sequence_parallel=True)),
]


@pytest.mark.exhaustive  # each rank is a process that imports everything
@pytest.mark.parametrize("case", CASES, ids=map(str, CASES))
def test_training_on_transformer_engine_equals_peft(
    case, tmp_path, base_model, peft_adapter, peft_result
):
    torch.save(case, tmp_path / "case")
    variables = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    directories = (base_model(case.model), peft_adapter(case.model, case.settings))
    ranks = [
        subprocess.Popen(
            [
                *(sys.executable, RUN, str(rank), str(case.world_size), tmp_path / "rendezvous"),
                *(*directories, tmp_path / "case", tmp_path / "result"),
            ],
            env=variables,
        )
        for rank in range(case.world_size)
    ]
    try:
        assert [process.wait(timeout=300) for process in ranks] == [0] * len(ranks)
    finally:
        for process in ranks:
            process.kill()
    by_rank = [
        torch.load(tmp_path / f"result.{rank}", weights_only=False) for rank in range(len(ranks))
    ]
    assert_equals_peft(by_rank, peft_result(case.model, case.settings), case)
