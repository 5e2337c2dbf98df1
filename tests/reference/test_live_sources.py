"""Live references of whole configurations are the same model, wherever its weights are."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from ..train.tiny_run import LORA, NUM_LAYERS
from .tiny_cache import Files, score_config

Said = dict[tuple[str, int, int], torch.Tensor]


def say(file: str) -> tuple[Said, dict[str, bool]]:
    """On every rank: what each source says, by its name, row and layer; and where weights are."""
    from megatron_idpo.cli.train import OPTIONAL, REQUIRED
    from megatron_idpo.config.run_config import load_config
    from megatron_idpo.convert.frozen_model import FrozenModel
    from megatron_idpo.convert.model_source import open_model
    from megatron_idpo.data.packing.batches import build_batch
    from megatron_idpo.data.run_pairs import load_run_pairs, row_settings
    from megatron_idpo.mcore.parallel.groups import this_rank
    from megatron_idpo.mcore.parallel.world import joined_world, running
    from megatron_idpo.reference import live
    from megatron_idpo.reference.frozen import frozen_model
    from megatron_idpo.train.build import build_policy, reference_in_policy

    config = load_config(file, required=REQUIRED, optional=OPTIONAL)
    pairs = load_run_pairs(config).train
    with joined_world() as world, running(config.layout.layout()):
        model = FrozenModel.of(open_model(config.model.path))
        rows = row_settings(config, world.size, data_rank=this_rank().data)
        batch = build_batch(pairs, np.arange(8), rows, consumed_pairs=0)
        said: Said = {}

        def hear(name: str, reference: Any) -> None:
            for number, found in enumerate(reference.logps(batch)):
                said.update({(name, number, layer): one for layer, one in found.items()})

        chunks, dpo = frozen_model(config, model, show_progress=False)
        hear("resident", live.Resident(dpo, chunks))
        where = _offload(live, dpo, chunks, hear)
        policy = build_policy(config, model, show_progress=False)
        if policy.adapters is not None:
            for _, parameter in policy.adapters.parameters():
                parameter.data.fill_(0.1)
        hear("start", reference_in_policy(policy, model))
    return said, where


def _offload(live: Any, dpo: Any, chunks: Any, hear: Any) -> dict[str, bool]:
    """Hear an offloaded model twice, and watch one of its weights meanwhile."""
    first = next(chunks[0].parameters())
    on_device, seen = first.data_ptr(), []
    offloaded = live.Offloaded(dpo, chunks)
    in_host = first.data_ptr()
    ordinary = live.run_batch

    def run_batch(*args: Any) -> Any:
        seen.append(first.data_ptr())
        return ordinary(*args)

    with patch.object(live, "run_batch", run_batch):
        hear("offloaded", offloaded)
        hear("offloaded again", offloaded)
    return {
        "moved out": in_host != on_device,
        "copied in for each pass": len(seen) == 2 and in_host not in seen,
        "out again": first.data_ptr() == in_host,
    }


@pytest.mark.distributed
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_all_sources_say_the_same_bits(
    tiny: Files, workers: Any, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    """Also the model under adapters that are no longer zero, in a pipeline."""
    sections = {} if lora is None else {"lora": lora}
    file = score_config(tiny, tmp_path / "run", layout={"pipeline": 2}, **sections)
    layers = set()
    for said, where in workers.run(say, 2, file):
        assert all(where.values()), where
        for (name, row, layer), found in said.items():
            layers.add(layer)
            assert found.dtype == torch.float32
            assert torch.equal(found, said["resident", row, layer]), (name, row, layer)
        names = {name for name, _, _ in said}
        assert names == {"resident", "offloaded", "offloaded again", "start"}
    assert layers == {1, 3, NUM_LAYERS}
