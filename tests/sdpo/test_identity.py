"""The identity of tensors in memory: the same in every layout, another for every change."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.mcore.parallel.layout import Layout
from megatron_idpo.testing import write_tiny_hf_model

pytestmark = pytest.mark.distributed

Named = list[tuple[str, Tensor]]


def of_tensors(cases: list[Named]) -> list[str]:
    from megatron_idpo.sdpo.tensor_identity import tensors_identity

    Layout().start()
    return [tensors_identity(iter(case)) for case in cases]


def of_model(path: str, layout: Layout) -> str:
    from megatron_idpo.convert.megatron_to_hf import whole_tensors
    from megatron_idpo.convert.model_source import load_base, open_model
    from megatron_idpo.mcore.model.build import build_model
    from megatron_idpo.sdpo.tensor_identity import tensors_identity

    source = open_model(path)
    layout.start()
    chunks = build_model(source.architecture, layout)
    load_base(source, chunks)
    return tensors_identity(whole_tensors(chunks, source.architecture))


def test_name_dtype_shape_and_every_bit_count_but_not_the_order(workers: Any) -> None:
    one, two = torch.arange(6.0).view(2, 3), torch.ones(2, dtype=torch.bfloat16)
    named: Named = [("one", one), ("two", two)]
    changed = one.clone()
    changed.view(torch.uint8)[-1, -1] ^= 1
    others: list[Named] = [
        [("one", changed), ("two", two)],
        [("other", one), ("two", two)],
        [("one", one.view(3, 2)), ("two", two)],
        [("one", one), ("two", two.half())],
        [("one", one)],
        [("one", -0.0 * one), ("two", two)],
        [("one", 0.0 * one), ("two", two)],
    ]
    same: list[Named] = [named[::-1], [("one", one.t().contiguous().t()), ("two", two)]]
    (found,) = workers.run(of_tensors, 1, [named, *same, *others])
    assert found[0] == found[1] == found[2]
    assert len(set(found)) == 1 + len(others)


def test_it_is_the_same_in_every_layout(workers: Any, tmp_path: Any) -> None:
    """Tied embeddings, which the last stage has a copy of, and a padded vocabulary too."""
    sizes = {"vocab_size": 131, "num_hidden_layers": 4, "tie_word_embeddings": True}
    path = str(write_tiny_hf_model(tmp_path / "model", "llama", seed=3, **sizes))
    (one,) = workers.run(of_model, 1, path, Layout())
    for ranks, layout in (
        (2, Layout(tensor=2)),
        (2, Layout(pipeline=2)),
        (2, Layout()),
        (4, Layout(pipeline=2, virtual_pipeline=2)),
    ):
        assert set(workers.run(of_model, ranks, path, layout)) == {one}, layout
