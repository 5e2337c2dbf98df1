"""Hugging Face -> Megatron-Core -> Hugging Face is bitwise exact in every layout.

Each case converts one model in one layout and exports it from another layout, which may have
another number of processes. `make test` has one pair of layouts for each model; every model with
every layout is `exhaustive`, which exports from the same layout too. Results are read with the
safetensors library, not with our reader.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_idpo.config.layout import Layout
from megatron_idpo.testing import write_tiny_hf_model

BIG = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-odd-vocab": ("llama", {"tie_word_embeddings": True, "vocab_size": 509}),
    "llama-odd-vocab": ("llama", {"vocab_size": 509}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VARIANTS = [(model, dtype) for model in MODELS for dtype in DTYPES]

LAYOUTS = [
    Layout(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual)
    for tensor in (1, 2, 4)
    for pipeline, virtual in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2))
    if tensor * pipeline <= 8
]
UNEVEN = Layout(pipeline=4, pipeline_layers=(1, 3, 3, 1))

TOKENIZER = {
    "tokenizer_config.json": '{"model_max_length":  7}',
    "vocab.json": json.dumps({f"t{i}": i for i in range(256)}, indent=3),
    "merges.txt": "#version: 0.2\n",
    "chat_template.jinja": "{{ messages }}\r\n",
}
"""Files that must be copied unchanged, with unusual spacing that no serializer would write."""


def label(layout: Layout) -> str:
    return f"TP{layout.tensor}-PP{layout.pipeline}-VP{layout.virtual_pipeline}"


IN_MAKE_TEST = {
    ("llama-tied-odd-vocab", "fp32"): (Layout(pipeline=2, virtual_pipeline=2), Layout(tensor=4)),
    ("llama-odd-vocab", "fp32"): (Layout(pipeline=4, virtual_pipeline=2), Layout(tensor=2)),
    ("mistral", "bf16"): (Layout(tensor=4), Layout()),
    ("qwen2", "fp32"): (Layout(tensor=2, pipeline=2), Layout(pipeline=2, virtual_pipeline=2)),
    ("qwen3", "bf16"): (Layout(), Layout(tensor=2, pipeline=2)),
}
"""The layouts to save in and to export from; at most 4 ranks."""


def cases() -> list[Any]:
    chosen = [
        pytest.param(variant, saved_in, [exported_from], id="-".join(variant))
        for variant, (saved_in, exported_from) in IN_MAKE_TEST.items()
    ]
    for number, layout in enumerate(LAYOUTS):
        for variant in range(len(VARIANTS)):
            # Never the same layout, and another distance in each case, so that all kinds meet.
            distance = 1 + (5 * number + variant) % (len(LAYOUTS) - 1)
            other = LAYOUTS[(number + distance) % len(LAYOUTS)]
            chosen.append(
                pytest.param(
                    VARIANTS[variant],
                    layout,
                    [layout, other],
                    id=f"{'-'.join(VARIANTS[variant])}-{label(layout)}-to-{label(other)}",
                    marks=pytest.mark.exhaustive,
                )
            )
    return chosen


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Tiny checkpoints on disk, with companions, created on first use."""
    made: dict[tuple[str, str], Path] = {}

    def make(model: str, dtype: str = "fp32") -> Path:
        if (model, dtype) not in made:
            directory = made[model, dtype] = tmp_path_factory.mktemp(f"{model}-{dtype}")
            family, overrides = MODELS[model]
            name = str(DTYPES[dtype]).removeprefix("torch.")
            write_tiny_hf_model(directory, family, seed=5, **(BIG | overrides))
            path = directory / "model.safetensors"
            weights = {key: one.to(DTYPES[dtype]) for key, one in load_file(path).items()}
            save_file(weights, path, metadata={"format": "pt"})
            config = json.loads((directory / "config.json").read_text()) | {"dtype": name}
            (directory / "config.json").write_text(json.dumps(config, indent=7))
            for file, content in TOKENIZER.items():
                (directory / file).write_bytes(content.encode())
        return made[model, dtype]

    return make


def tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory's safetensors files."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def same_bits(one: Tensor, other: Tensor) -> bool:
    bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    return (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(*bits)


def assert_same_tensors(directory: Path, expected: dict[str, Tensor]) -> None:
    found = tensors(directory)
    assert found.keys() == expected.keys()
    different = [name for name, one in expected.items() if not same_bits(found[name], one)]
    assert not different


# ---- on every rank -------------------------------------------------------------------------------


def there(source: str, target: str, layout: Layout, **options: Any) -> None:
    """Hugging Face to Megatron-Core."""
    from megatron_idpo.convert.hf_to_megatron import convert

    convert(Path(source), Path(target), layout=layout, **options)


def back(source: str, target: str, layout: Layout, **options: Any) -> None:
    """Megatron-Core to Hugging Face."""
    from megatron_idpo.convert.megatron_to_hf import convert

    convert(Path(source), Path(target), layout=layout, **options)


def there_and_back(source: str, between: str, target: str, layout: Layout) -> None:
    """Both directions in the same layout."""
    there(source, between, layout)
    back(between, target, layout)


# ---- bitwise round trips ------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize(("variant", "saved_in", "exported_from"), cases())
def test_every_tensor_round_trips_bitwise(
    variant, saved_in, exported_from, workers, hf_model, tmp_path
):
    source = hf_model(*variant)
    between = str(tmp_path / "between")
    workers.run(there, saved_in.model_ranks, str(source), between, saved_in)
    expected = tensors(source)
    for layout in exported_from:
        target = tmp_path / label(layout)
        workers.run(back, layout.model_ranks, between, str(target), layout)
        assert_same_tensors(target, expected)
        for path in source.iterdir():
            assert (target / path.name).read_bytes() == path.read_bytes()
    names = {"between", *map(label, exported_from)}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.distributed
def test_uneven_stages_and_data_parallel_replicas_round_trip(workers, hf_model, tmp_path):
    source = hf_model("llama-odd-vocab")
    between, out = str(tmp_path / "between"), str(tmp_path / "out")
    workers.run(there, 4, str(source), between, UNEVEN)
    workers.run(back, 4, between, out, Layout(tensor=2))
    assert_same_tensors(Path(out), tensors(source))


@pytest.mark.distributed
def test_sharded_source_round_trips(workers, hf_model, tmp_path):
    from transformers import AutoModelForCausalLM

    source, sharded = hf_model("qwen2"), tmp_path / "sharded"
    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(sharded, max_shard_size="300KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    between, out = str(tmp_path / "between"), str(tmp_path / "out")
    workers.run(there, 2, str(sharded), between, Layout(tensor=2))
    workers.run(back, 1, between, out, Layout())
    assert_same_tensors(Path(out), tensors(source))


STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"


@pytest.mark.distributed
@pytest.mark.skipif(not STORIES.is_dir(), reason="no real checkpoint next to this checkout")
def test_real_model_round_trips_file_by_file(workers, tmp_path):
    between, out = str(tmp_path / "between"), tmp_path / "out"
    workers.run(there_and_back, 2, str(STORIES), between, str(out), Layout(tensor=2))
    assert sorted(path.name for path in out.iterdir()) == sorted(p.name for p in STORIES.iterdir())
    for path in STORIES.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


# ---- another dtype -------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize("cast_in", ["there", "back"])
def test_dtype_option_casts_and_sets_the_config(cast_in, workers, hf_model, tmp_path):
    source = hf_model("llama-tied-odd-vocab")
    between, out = str(tmp_path / "between"), tmp_path / "out"
    layout = Layout(tensor=2)
    options = {"dtype": "bf16"}
    workers.run(there, 2, str(source), between, layout, **(options if cast_in == "there" else {}))
    workers.run(back, 2, between, str(out), layout, **(options if cast_in == "back" else {}))
    assert_same_tensors(out, {name: one.bfloat16() for name, one in tensors(source).items()})
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    for name in TOKENIZER:
        assert (out / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.distributed
def test_transformers_loads_the_export(workers, hf_model, tmp_path):
    from transformers import AutoModelForCausalLM

    source, out = hf_model("qwen3"), tmp_path / "out"
    workers.run(there_and_back, 2, str(source), str(tmp_path / "m"), str(out), Layout(pipeline=2))
    tokens = torch.arange(12)[None]
    answers = [
        AutoModelForCausalLM.from_pretrained(directory)(tokens).logits
        for directory in (source, out)
    ]
    assert torch.equal(*answers)
