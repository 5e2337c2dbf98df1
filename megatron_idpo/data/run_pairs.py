"""The pairs of a run as its configuration names them: the training ones and the held-out ones.

Every verb that touches data gets it here, so that all of them see the same pairs in the same order.
Held-out pairs of `data.eval_pairs` and `data.eval_fraction` are chosen by prompt, with all their
answers: datasets repeat prompts (and weights repeat pairs), and a prompt on both sides would make
the evaluation one of memory.

Shapes: P pairs of the sources; G different prompts.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.sections import DataConfig, ModelConfig, SourceConfig
from megatron_idpo.data.packing.batches import RowSettings
from megatron_idpo.data.report import DataReport
from megatron_idpo.data.sources.open import Source
from megatron_idpo.data.tokenize.chat import TokenOptions
from megatron_idpo.data.tokenize.dataset import PairDataset, load_pairs
from megatron_idpo.data.tokenize.pair import PairSource
from megatron_idpo.data.tokenize.tokenizers import Tokenizer, load_tokenizer
from megatron_idpo.errors import ConfigError, DataError

_CHECKPOINT_TOKENIZER = "huggingface"
"""Where a converted checkpoint keeps the tokenizer of its model."""


@dataclass(frozen=True, slots=True)
class RunPairs:
    """What a run trains on, what it is evaluated on, and what became of the sources' rows."""

    train: PairDataset
    eval: PairDataset | None
    tokenizer: Tokenizer
    train_report: DataReport
    """Of `data.train`, before weights and before pairs are held out."""

    eval_report: DataReport | None
    """Of `data.eval`; None where held-out pairs come from `data.train`."""


def load_run_pairs(config: RunConfig) -> RunPairs:
    """Reads and tokenises the sources of `config.data` with the tokenizer of `config.model`.

    Raises:
        DataError: as `load_tokenizer` and `load_pairs` do; or holding pairs out leaves none.
    """
    data = config.data
    tokenizer = load_tokenizer(tokenizer_path(config.model), data.chat_template)
    train = _load(data, data.train, tokenizer)
    if data.eval is not None:
        held_out = _load(data, data.eval, tokenizer, listed_as=".eval")
        return RunPairs(train, held_out, tokenizer, train.report, held_out.report)
    wanted_pairs = data.eval_pairs or ceil((data.eval_fraction or 0) * len(train))
    if not wanted_pairs:
        return RunPairs(train, None, tokenizer, train.report, None)
    is_held_out_P = hold_out(train, wanted_pairs, seed=data.seed)
    if is_held_out_P.all():
        location = "data.eval_pairs" if data.eval_pairs else "data.eval_fraction"
        message = f"holding out {wanted_pairs} of {len(train)} pairs, by whole prompts, leaves none"
        raise DataError.at(location, message, "hold out fewer, or name other data in data.eval")
    return RunPairs(
        train.select(np.flatnonzero(~is_held_out_P)),
        train.select(np.flatnonzero(is_held_out_P)),
        tokenizer,
        train.report,
        None,
    )


def row_settings(config: RunConfig, world_size: int, *, data_rank: int = 0) -> RowSettings:
    """How a run of `world_size` processes lays out its rows.

    Padding is token 0, whatever that is: nothing attends to it and nothing scores it.
    """
    layout = config.layout.layout()
    return RowSettings(
        row_tokens=config.data.row_tokens,
        pad_token=0,
        share_prompt=config.data.share_prompt,
        trim_tokens=config.data.trim_tokens,
        own_lengths=layout.pipeline == 1,
        rows_multiple=layout.pipeline if layout.virtual_pipeline > 1 else 1,
        data_size=layout.data(world_size),
        data_rank=data_rank,
    )


def check_tokens(pairs: RunPairs, vocab_size: int) -> None:
    """Refuse a tokenizer that is not the model's.

    Raises:
        ConfigError: a pair has a token that the model has no embedding for.
    """
    for dataset in filter(None, (pairs.train, pairs.eval)):
        if dataset.highest_token >= vocab_size:
            message = (
                f"token {dataset.highest_token} occurs in the data, but the model's vocabulary "
                f"ends at {vocab_size - 1}"
            )
            raise ConfigError.at("model.tokenizer", message, "use the model's own tokenizer")


def tokenizer_path(model: ModelConfig) -> str:
    """Where the tokenizer is: as configured, in the model's directory, or in our checkpoint's."""
    if model.tokenizer is not None:
        return model.tokenizer
    inside = Path(model.path) / _CHECKPOINT_TOKENIZER
    return str(inside) if inside.is_dir() else model.path


def hold_out(pairs: PairSource, wanted_pairs: int, *, seed: int) -> NDArray[np.bool_]:
    """Which pairs to hold out: whole prompts, the fewest that make at least `wanted_pairs` pairs.

    The prompts stand in the order of a keyed hash of their tokens. So the choice depends on the
    seed and on the prompts alone, and data that are added later leave it nearly as it is.

    Args:
        pairs: a collection of P pairs.
        wanted_pairs: 1 or more; all pairs are held out where there are fewer.
        seed: any integer.

    Returns:
        bool [P].
    """
    assert wanted_pairs >= 1, wanted_pairs
    key = str(seed).encode()
    digests = (
        hashlib.blake2b(pairs[index].prompt_tokens, digest_size=8, key=key).digest()
        for index in range(len(pairs))
    )
    place_P = np.frombuffer(b"".join(digests), "<u8")
    place_G, pairs_G = np.unique(place_P, return_counts=True)
    last = int(np.searchsorted(pairs_G.cumsum(), wanted_pairs))
    held_out_P: NDArray[np.bool_] = place_P <= place_G[min(last, len(place_G) - 1)]
    return held_out_P


def source_of(config: SourceConfig) -> Source:
    """What a configuration names, for the reader."""
    return Source(**config.model_dump(exclude_none=True))


def _load(
    data: DataConfig, sources: Sequence[SourceConfig], tokenizer: Tokenizer, *, listed_as: str = ""
) -> PairDataset:
    bad_rows_file = None if data.bad_rows_file is None else Path(data.bad_rows_file)
    if bad_rows_file is not None and listed_as:
        bad_rows_file = bad_rows_file.with_stem(bad_rows_file.stem + listed_as)
    return load_pairs(
        [source_of(source) for source in sources],
        tokenizer,
        TokenOptions(max_length=data.max_length, truncation=data.truncation, format=data.format),
        cache=None if data.cache is None else Path(data.cache),
        num_workers=data.num_workers,
        on_bad_row=data.on_bad_row,
        bad_rows_file=bad_rows_file,
        seed=data.seed,
    )
