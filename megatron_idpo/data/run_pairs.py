"""The training and held-out pairs of a run, loaded from its configuration.

Every verb loads data through this module, so that all of them see the same pairs in the same order.
Held-out pairs of `data.eval_pairs` and `data.eval_fraction` are selected by prompt, with all their
answers: datasets repeat prompts (and weights repeat pairs), and a prompt in both sets would make
the evaluation measure memorization.

Shapes: P pairs of the sources; G different prompts.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.config.data import DataConfig, ModelConfig, SourceConfig
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.data.packing.batches import RowSettings
from megatron_idpo.data.packing.plan import coarse_trim_tokens
from megatron_idpo.data.pairs import PairSource
from megatron_idpo.data.report import DataReport
from megatron_idpo.data.tokenize.chat import TokenOptions
from megatron_idpo.data.tokenize.dataset import PairDataset, load_pairs
from megatron_idpo.data.tokenize.tokenizers import Tokenizer, load_tokenizer
from megatron_idpo.errors import ConfigError, DataError

_CHECKPOINT_TOKENIZER = "huggingface"
"""Subdirectory of a converted checkpoint with the tokenizer of its model."""


@dataclass(frozen=True, slots=True)
class RunPairs:
    """The pairs to train on and to evaluate on, their tokenizer, and the data reports."""

    train: PairDataset
    eval: PairDataset | None
    tokenizer: Tokenizer
    train_report: DataReport
    """Of `data.train`, before weights and before pairs are held out."""

    eval_report: DataReport | None
    """Of `data.eval`; None where held-out pairs come from `data.train`."""


def load_run_pairs(
    config: RunConfig, model_path: str | None = None, tokenizer_directory: str | None = None
) -> RunPairs:
    """Read and tokenize the sources of `config.data` with the tokenizer of `config.model`.

    Args:
        config: of the run.
        model_path: the model's directory, if `config.model` has its name on the hub.
        tokenizer_directory: of `model.tokenizer`, if `config.model` has its name on the hub.

    Raises:
        DataError: see `load_tokenizer` and `load_pairs`; or holding out leaves no training pair.
    """
    data = config.data
    path = tokenizer_directory or tokenizer_path(config.model, model_path)
    tokenizer = load_tokenizer(path, data.chat_template)
    pairs = _load(data, data.train, tokenizer)
    if data.eval is not None:
        held_out = _load(data, data.eval, tokenizer, list_suffix=".eval")
        return RunPairs(pairs, held_out, tokenizer, pairs.report, held_out.report)
    num_held_out = data.eval_pairs or ceil((data.eval_fraction or 0) * len(pairs))
    if not num_held_out:
        return RunPairs(pairs, None, tokenizer, pairs.report, None)
    is_held_out_P = hold_out(pairs, num_held_out, seed=data.seed)
    if is_held_out_P.all():
        location = "data.eval_pairs" if data.eval_pairs else "data.eval_fraction"
        message = f"holding out {num_held_out} of {len(pairs)} pairs, by whole prompts, leaves none"
        raise DataError.at(location, message, "hold out fewer, or name other data in data.eval")
    train, held_out = (
        pairs.select(np.flatnonzero(mask_P)) for mask_P in (~is_held_out_P, is_held_out_P)
    )
    return RunPairs(train, held_out, tokenizer, pairs.report, None)


def row_settings(config: RunConfig, world_size: int, *, data_rank: int = 0) -> RowSettings:
    """Row settings of a run of `world_size` processes.

    Padding is token 0, independent of the tokenizer: it is neither attended to nor scored.
    """
    layout = config.layout
    return RowSettings(
        row_tokens=config.data.row_tokens,
        pad_token=0,
        share_prompt=config.data.share_prompt,
        trim_tokens=_trim_tokens(config.data),
        # Pipeline stages exchange activations of one fixed shape per step.
        trim_rows_separately=layout.pipeline == 1,
        rows_multiple=layout.pipeline if layout.virtual_pipeline > 1 else 1,
        data_size=layout.data(world_size),
        data_rank=data_rank,
    )


def _trim_tokens(data: DataConfig) -> int:
    """The multiple to which rows are trimmed: on a GPU coarse, so that few lengths are compiled."""
    from megatron_idpo.mcore.cpu.redirect import default_device

    if default_device().type == "cpu":
        return data.trim_tokens
    return coarse_trim_tokens(data.row_tokens, data.trim_tokens)


def check_tokens(pairs: RunPairs, vocab_size: int) -> None:
    """Check that the model has an embedding for every token.

    Raises:
        ConfigError: a token is beyond the vocabulary, so the tokenizer is not the model's.
    """
    for dataset in filter(None, (pairs.train, pairs.eval)):
        if dataset.highest_token >= vocab_size:
            message = (
                f"token {dataset.highest_token} occurs in the data, but the model's vocabulary "
                f"ends at {vocab_size - 1}"
            )
            raise ConfigError.at("model.tokenizer", message, "use the model's own tokenizer")


def tokenizer_path(model: ModelConfig, model_path: str | None = None) -> str:
    """The configured tokenizer, or else the one in the model's or the checkpoint's directory.

    Args:
        model: the section of the configuration.
        model_path: the model's directory, if the configuration has its name on the hub.
    """
    if model.tokenizer is not None:
        return model.tokenizer
    path = model_path or model.path
    inside = Path(path) / _CHECKPOINT_TOKENIZER
    return str(inside) if inside.is_dir() else path


def hold_out(pairs: PairSource, num_pairs: int, *, seed: int) -> NDArray[np.bool_]:
    """Which pairs to hold out: the fewest whole prompts that have at least `num_pairs` pairs.

    Prompts are ordered by a keyed hash of their tokens. The selection therefore depends only on the
    seed and the prompts, and adding data later changes it little.

    Args:
        pairs: a collection of P pairs.
        num_pairs: 1 or more; all pairs are held out if there are fewer.
        seed: any integer.

    Returns:
        bool [P].
    """
    assert num_pairs >= 1, num_pairs
    key = str(seed).encode()
    digests = (
        hashlib.blake2b(pairs[index].prompt_tokens, digest_size=8, key=key).digest()
        for index in range(len(pairs))
    )
    hash_P = np.frombuffer(b"".join(digests), "<u8")
    hash_G, pairs_G = np.unique(hash_P, return_counts=True)  # ascending
    last = int(np.searchsorted(pairs_G.cumsum(), num_pairs))
    is_held_out_P: NDArray[np.bool_] = hash_P <= hash_G[min(last, len(hash_G) - 1)]
    return is_held_out_P


def _load(
    data: DataConfig,
    sources: Sequence[SourceConfig],
    tokenizer: Tokenizer,
    *,
    list_suffix: str = "",
) -> PairDataset:
    sources = [
        source.model_copy(update={"columns": data.columns}) if not source.has_columns else source
        for source in sources
    ]
    bad_rows_file = None if data.bad_rows_file is None else Path(data.bad_rows_file)
    if bad_rows_file is not None:
        bad_rows_file = bad_rows_file.with_stem(bad_rows_file.stem + list_suffix)
    return load_pairs(
        sources,
        tokenizer,
        TokenOptions(max_length=data.max_length, truncation=data.truncation, format=data.format),
        cache=None if data.cache is None else Path(data.cache),
        num_workers=data.num_workers,
        on_bad_row=data.on_bad_row,
        bad_rows_file=bad_rows_file,
        seed=data.seed,
    )
