"""Layer inputs in the host's memory: which tensors are copied, and that gradients are the same.

Whole runs with it are in `tests/train/test_loop.py`, its memory in
`tests/phantom_gpu/test_long_rows.py`.
"""

from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_idpo.config.layout import Layout
from megatron_idpo.testing import tiny_hf_config

pytestmark = pytest.mark.distributed

TOKENS = 12


def gradients(*, is_offloaded: bool) -> tuple[dict[str, torch.Tensor], list[tuple[int, ...]]]:
    """Gradients of a loss, and the shapes of what was copied to the host."""
    from megatron_idpo.mcore.attention.row_params import RowParams
    from megatron_idpo.mcore.model import host_offload
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.model.build import ModelOptions, Recompute, build_model
    from megatron_idpo.mcore.parallel.groups import start_layout

    start_layout(Layout())
    architecture = Architecture.from_hf(tiny_hf_config("llama"))
    options = ModelOptions(recompute=Recompute(granularity="full"))
    (model,) = build_model(architecture, Layout(), options)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.05, generator=generator)
    copied: list[tuple[int, ...]] = []
    to_host = host_offload._to_host

    def counted(hidden_size: int, saved: torch.Tensor) -> Any:
        kept = to_host(hidden_size, saved)
        if not isinstance(kept, torch.Tensor):
            copied.append(tuple(saved.shape))
        return kept

    with patch.object(host_offload, "_to_host", counted):
        if is_offloaded:
            host_offload.offload_layer_inputs([model])
        tokens_1T = torch.arange(TOKENS)[None]
        row = RowParams.plain(TOKENS)
        logits = model(tokens_1T, tokens_1T, None, packed_seq_params=row)
        logits.square().mean().backward()
        with torch.no_grad():
            model(tokens_1T, tokens_1T, None, packed_seq_params=row)
    return {name: p.grad for name, p in model.named_parameters()}, copied


def test_inputs_of_layers_are_copied_and_nothing_else(workers):
    ((expected, nothing),) = workers.run(gradients, 1, is_offloaded=False)
    ((actual, copied),) = workers.run(gradients, 1, is_offloaded=True)
    config = tiny_hf_config("llama")
    shape = (TOKENS, 1, config["hidden_size"])
    # The last one is that of the final norm, which is not recomputed.
    assert not nothing and set(copied) == {shape}
    assert config["num_hidden_layers"] <= len(copied) <= config["num_hidden_layers"] + 3
    for name, gradient in expected.items():
        assert torch.equal(gradient, actual[name]), name
        assert gradient.abs().max() > 0, name
