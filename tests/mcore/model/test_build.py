"""Built models: megatron-core's configuration, the chunks, and the parameters' names.

Their outputs are compared with Transformers in `tests/convert/test_parity.py`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_idpo.config.layout import Layout
from megatron_idpo.errors import ConfigError
from megatron_idpo.testing import tiny_hf_config

pytestmark = pytest.mark.distributed


def config_fields(
    names: list[str], family: str, layout: Layout, options: dict[str, Any], overrides: Any
) -> dict[str, Any]:
    """The named fields of `TransformerConfig`."""
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.model.build import ModelOptions, Recompute, transformer_config
    from megatron_idpo.mcore.parallel.groups import start_layout

    recompute = Recompute(**options.pop("recompute", {}))
    options["overrides"] = options.pop("megatron_overrides", {})
    architecture = Architecture.from_hf(tiny_hf_config(family, **overrides))
    start_layout(layout)
    config = transformer_config(architecture, layout, ModelOptions(recompute=recompute, **options))
    return {name: getattr(config, name) for name in names}


@pytest.fixture
def fields(workers) -> Callable[..., dict[str, Any]]:
    def run(*names: str, family="llama", layout=None, overrides=None, **options) -> dict[str, Any]:
        layout = layout or Layout()
        arguments = (list(names), family, layout, options, overrides or {})
        return workers.run(config_fields, layout.model_ranks, *arguments)[0]

    return run


def test_shape_fields(fields):
    shape = fields(
        "num_layers",
        "num_query_groups",
        "kv_channels",
        "add_qkv_bias",
        "qk_layernorm",
        "layernorm_epsilon",
        family="qwen3",
        overrides={"num_key_value_heads": 2, "rms_norm_eps": 3e-6},
    )
    assert shape == {
        "num_layers": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
        "add_qkv_bias": False,
        "qk_layernorm": True,
        "layernorm_epsilon": 3e-6,
    }
    assert fields("add_qkv_bias", family="qwen2") == {"add_qkv_bias": True}


def test_window_fields_exclude_the_query_itself(fields):
    window = ("window_size", "window_attn_skip_freq")
    assert fields(*window, family="mistral", overrides={"sliding_window": 5}) == {
        "window_size": (4, 0),
        "window_attn_skip_freq": [1, 1, 1, 1],
    }
    half = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3}
    assert fields(*window, family="qwen2", overrides=half) == {
        "window_size": (5, 0),
        "window_attn_skip_freq": [0, 0, 0, 1],
    }
    assert fields("window_size", family="mistral") == {"window_size": None}


@pytest.mark.parametrize(
    ("dtype", "bf16", "fp16"),
    [(torch.float32, False, False), (torch.bfloat16, True, False), (torch.float16, False, True)],
)
def test_dtype_fields(dtype, bf16, fp16, fields):
    assert fields("params_dtype", "pipeline_dtype", "bf16", "fp16", dtype=dtype) == {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": bf16,
        "fp16": fp16,
    }


RECOMPUTE = ("recompute_granularity", "recompute_method", "recompute_num_layers")


@pytest.mark.parametrize(
    ("recompute", "expected"),
    [
        ({}, (None, None, None)),
        ({"granularity": "selective"}, ("selective", None, None)),
        ({"granularity": "full"}, ("full", "uniform", 1)),
        ({"granularity": "full", "method": "block", "num_layers": 2}, ("full", "block", 2)),
    ],
)
def test_recompute_fields(recompute, expected, fields):
    assert fields(*RECOMPUTE, recompute=recompute) == dict(zip(RECOMPUTE, expected, strict=True))


def test_dropout_and_fusions_are_off_unless_overridden(fields):
    names = ("hidden_dropout", "attention_dropout", "masked_softmax_fusion")
    assert fields(*names) == dict(zip(names, (0.0, 0.0, False), strict=True))
    assert fields(*names, megatron_overrides={"hidden_dropout": 0.5})["hidden_dropout"] == 0.5


def chunk_parameters(family: str, layout: Layout, overrides: dict[str, Any]) -> list[Any]:
    """Pre/post-process flags of each chunk, global names with shapes, dtypes, rotary modules."""
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.model.build import ModelOptions, build_model, global_parameters
    from megatron_idpo.mcore.parallel.groups import start_layout

    start_layout(layout)
    architecture = Architecture.from_hf(tiny_hf_config(family, **overrides))
    chunks = build_model(architecture, layout, ModelOptions(dtype=torch.bfloat16))
    flags = [(chunk.pre_process, chunk.post_process) for chunk in chunks]
    shapes = {name: tuple(parameter.shape) for name, parameter in global_parameters(chunks)}
    dtypes = {parameter.dtype for _, parameter in global_parameters(chunks)}
    rotary = {type(chunk.rotary_pos_emb).__name__ for chunk in chunks}
    return [flags, shapes, dtypes, rotary]


def layers_of(shapes: dict[str, Any]) -> list[int]:
    return sorted({int(name.split(".")[2]) for name in shapes if ".layers." in name})


def test_global_names_number_layers_over_the_whole_model(workers):
    layout = Layout(pipeline=2, virtual_pipeline=2)
    first, last = workers.run(chunk_parameters, 2, "llama", layout, {})
    assert layers_of(first[1]) == [0, 2] and layers_of(last[1]) == [1, 3]
    assert first[0] == [(True, False), (False, False)]
    assert last[0] == [(False, False), (False, True)]
    assert "embedding.word_embeddings.weight" in first[1]
    assert {"decoder.final_layernorm.weight", "output_layer.weight"} <= last[1].keys()
    for part in (first, last):
        assert part[2] == {torch.bfloat16} and part[3] == {"RowRotary"}


def test_pipeline_layers_set_uneven_stages(workers):
    layout = Layout(pipeline=2, pipeline_layers=(1, 3))
    first, last = workers.run(chunk_parameters, 2, "llama", layout, {})
    assert layers_of(first[1]) == [0] and layers_of(last[1]) == [1, 2, 3]


@pytest.mark.parametrize(("vocab_size", "rows"), [(256, 128), (257, 129)])
def test_the_vocabulary_is_padded_to_a_multiple_of_tensor(vocab_size, rows, workers):
    overrides = {"vocab_size": vocab_size}
    for _, shapes, _, _ in workers.run(chunk_parameters, 2, "llama", Layout(tensor=2), overrides):
        assert shapes["embedding.word_embeddings.weight"] == (rows, 64)
        assert shapes["output_layer.weight"] == (rows, 64)


def test_tied_embeddings_have_a_copy_only_on_a_separate_last_stage(workers):
    tied = {"tie_word_embeddings": True}
    ((_, alone, _, _),) = workers.run(chunk_parameters, 1, "llama", Layout(), tied)
    assert "output_layer.weight" not in alone
    first, last = workers.run(chunk_parameters, 2, "llama", Layout(pipeline=2), tied)
    assert "output_layer.weight" not in first[1] and "output_layer.weight" in last[1]


def test_a_layout_that_does_not_fit_is_rejected(workers):
    with pytest.raises(
        ConfigError, match=r"layout\.pipeline: 4 layers do not divide evenly over 3"
    ):
        workers.run(chunk_parameters, 3, "llama", Layout(pipeline=3), {})


def padded_sizes() -> list[int]:
    from megatron_idpo.mcore.model.build import padded_vocab_size

    return [
        padded_vocab_size(size, tensor) for size, tensor in ((509, 1), (509, 2), (512, 4), (5, 4))
    ]


def test_padded_vocab_size(workers):
    assert workers.run(padded_sizes, 1) == [[509, 510, 512, 8]]
