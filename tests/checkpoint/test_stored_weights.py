"""The tensors that a checkpoint lists: file sizes, and the check against a model.

`tests/convert/test_megatron_to_hf.py` tests the same damage in a conversion.
"""

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_idpo.checkpoint.stored_weights import StoredWeight, check_same_model, stored_weights
from megatron_idpo.errors import CheckpointError

EMBEDDING, NORM = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"
SHAPES = {EMBEDDING: (8, 4), NORM: (4,)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two weights of 100 bytes each in one file, and optimizer state in a missing file."""
    stored = {
        key: TensorStorageMetadata(
            properties=TensorProperties(dtype=torch.bfloat16), size=torch.Size(shape), chunks=[]
        )
        for key, shape in {**SHAPES, "optimizer.state": (4,)}.items()
    }
    locations = {
        MetadataIndex(EMBEDDING): _StorageInfo("__0_0.distcp", 0, 100),
        MetadataIndex(NORM): _StorageInfo("__0_0.distcp", 100, 100),
        MetadataIndex("optimizer.state"): _StorageInfo("__1_0.distcp", 0, 100),
    }
    metadata = Metadata({**stored, "common_state": BytesStorageMetadata()}, storage_data=locations)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (tmp_path / "__0_0.distcp").write_bytes(bytes(200))
    return tmp_path


def test_only_weights_are_listed(checkpoint):
    expected = {key: StoredWeight(shape, torch.bfloat16) for key, shape in SHAPES.items()}
    assert stored_weights(checkpoint) == expected
    check_same_model(checkpoint, SHAPES, vocab_size=8)


@pytest.mark.parametrize(("num_bytes", "key"), [(199, NORM), (99, EMBEDDING), (0, EMBEDDING)])
def test_first_truncated_weight_is_named(num_bytes, key, checkpoint):
    (checkpoint / "__0_0.distcp").write_bytes(bytes(num_bytes))
    message = rf"__0_0\.distcp: is truncated in or before tensor '{key}', .*: {num_bytes} bytes"
    with pytest.raises(CheckpointError, match=message):
        stored_weights(checkpoint)


def test_missing_file_is_named_with_a_weight(checkpoint):
    (checkpoint / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=rf"__0_0\.distcp: is missing; .*'{EMBEDDING}'"):
        stored_weights(checkpoint)


@pytest.mark.parametrize("vocab_size", [5, 8])
def test_padded_vocabulary_is_accepted(vocab_size, checkpoint):
    """Independent of the padding of this run."""
    check_same_model(checkpoint, {**SHAPES, EMBEDDING: (12, 4)}, vocab_size)


OTHER_MODELS = [
    ({**SHAPES, EMBEDDING: (12, 4)}, 9, rf"'{EMBEDDING}' has shape \(8, 4\), expected \(9, 4\);"),
    ({**SHAPES, EMBEDDING: (8, 5)}, 8, rf"'{EMBEDDING}' has shape \(8, 4\), expected \(8, 5\);"),
    ({**SHAPES, NORM: (5,)}, 8, rf"'{NORM}' has shape \(4,\), expected \(5,\);"),
    ({EMBEDDING: (8, 4)}, 8, rf"'{NORM}' of shape \(4,\) is not expected;"),
    ({**SHAPES, "output_layer.weight": (8, 4)}, 8, r"'output_layer.weight' of .* is missing;"),
    ({"decoder.x": (1,)}, 8, r"'decoder.x' of shape \(1,\) is missing \(and 2 more differences\);"),
]


@pytest.mark.parametrize(("expected", "vocab_size", "message"), OTHER_MODELS)
def test_other_model_is_refused_on_one_line(expected, vocab_size, message, checkpoint):
    with pytest.raises(CheckpointError, match=message) as error:
        check_same_model(checkpoint, expected, vocab_size)
    assert str(error.value).startswith(f"{checkpoint}: is not the model that its config.json")
    assert "\n" not in str(error.value)


def test_padding_to_the_tensor_parallel_size_is_accepted(checkpoint):
    set_rows(checkpoint, 32001)
    check_same_model(checkpoint, SHAPES, 32000, num_kv_heads=6)
    with pytest.raises(CheckpointError):
        check_same_model(checkpoint, SHAPES, 32000, num_kv_heads=8)


def set_rows(checkpoint, num_rows):
    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata[EMBEDDING].size = torch.Size((num_rows, 4))
    path.write_bytes(pickle.dumps(metadata))


# This package pads to a multiple of TP, Megatron-LM to a multiple of 128 x TP.
PADDED = [(32003, 32004), (32003, 32128), (50257, 51200), (32000, 32000), (32000, 32768)]


@pytest.mark.parametrize(("vocab_size", "num_rows"), PADDED)
def test_usual_padding_is_accepted(vocab_size, num_rows, checkpoint):
    set_rows(checkpoint, num_rows)
    check_same_model(checkpoint, SHAPES, vocab_size)


@pytest.mark.parametrize(("vocab_size", "num_rows"), [(8, 5000), (32000, 32001), (32000, 34000)])
def test_other_vocabulary_size_is_refused(vocab_size, num_rows, checkpoint):
    set_rows(checkpoint, num_rows)
    message = rf"has shape \({num_rows}, 4\), expected \({vocab_size}, 4\)"
    with pytest.raises(CheckpointError, match=message):
        check_same_model(checkpoint, SHAPES, vocab_size)
