"""The frozen model: the layers and the norm of the configuration, ready to be read."""

from pathlib import Path
from typing import Any

import pytest

from .tiny_cache import Files, score_config


def build(file: str, overrides: list[str]) -> dict[str, Any]:
    """On a rank: what the model is like."""
    import torch

    from megatron_idpo.config.run_config import load_config
    from megatron_idpo.convert.frozen_model import FrozenModel
    from megatron_idpo.convert.model_source import open_model
    from megatron_idpo.mcore.parallel.world import joined_world, running
    from megatron_idpo.reference.frozen import frozen_model

    sections = ("model", "data", "objective", "layout")
    config = load_config(file, overrides, optional=sections)
    with joined_world(), running(config.layout.layout()):
        model = FrozenModel.of(open_model(config.model.path))
        chunks, dpo = frozen_model(config, model, show_progress=False)
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        return {
            "layers": dpo.layers,
            "dtypes": {parameter.dtype for parameter in parameters},
            "is frozen": not any(parameter.requires_grad for parameter in parameters),
            "is finite": all(bool(torch.isfinite(one).all()) for one in parameters),
        }


@pytest.mark.distributed
def test_it_is_frozen_and_read_where_it_should_be(
    tiny: Files, workers: Any, tmp_path: Path
) -> None:
    import torch

    file = score_config(tiny, tmp_path / "run")
    [found] = workers.run(build, 1, file, ["objective.layers=[2]", "model.dtype=bf16"])
    assert found["layers"] == [2]
    assert found["dtypes"] == {torch.bfloat16}
    assert found["is frozen"] and found["is finite"]
