"""Parity of packed rows with single sequences: log-probabilities and gradients.

Random pairs of chosen lengths run with every kind of attention, rope, layout and recompute; chats
go the whole way from messages to rows. `packed_answers.py` computes both sides.

Shapes: P pairs.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_idpo.config.data import SourceConfig
from megatron_idpo.config.layout import Layout
from megatron_idpo.data.pairs import Pair, pair_tokens
from megatron_idpo.data.tokenize.chat import TokenOptions
from megatron_idpo.data.tokenize.dataset import load_pairs
from megatron_idpo.data.tokenize.tokenizers import load_tokenizer
from megatron_idpo.testing import WorkerPool, write_tiny_hf_model

from .packed_answers import (
    PAD_TOKEN,
    RECOMPUTE,
    Answer,
    Run,
    packed_answers,
    packed_rows,
    single_answer,
)

# fp32 through 4 layers with another order of sums; a wrong visible token changes whole nats.
LOGP_ABSOLUTE = 1e-4
# Two fp32 roundings of the sum, for sequences beyond 400 nats: Transformers differs from itself
# (eager attention, SDPA) by 1.1e-4 on the real chats, whose longest answers have -1200 nats.
LOGP_RELATIVE = 2.5e-7
# The same for each parameter's gradient, as |difference| / |gradient| (Frobenius).
GRADIENT_RELATIVE = 1e-5

ROW_TOKENS = {True: 96, False: 160}
"""By `share_prompt`: the longest pair needs 96 positions, or 153 with its prompt twice."""

LENGTHS_P3 = np.array(
    [
        (57, 30, 9),  # fills a row to its last position, 60 % of it prompt
        (1, 7, 12),  # the shortest prompt
        (33, 1, 20),  # an answer truncated to one token
        (12, 28, 1),  # windows of 20 and 24 leave the prompt inside the answer
        (5, 3, 3),
        (20, 14, 17),
        (2, 1, 1),
    ]
)


def _rope(kind: str, factor: float, original: int, **more: float) -> dict[str, Any]:
    scaling = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
    return {"rope_scaling": scaling | more}


def _window(tokens: int, full_layers: int) -> dict[str, Any]:
    """Qwen's settings: the layers from `full_layers` on have a window."""
    windows = {"use_sliding_window": True, "sliding_window": tokens}
    return windows | {"max_window_layers": full_layers}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-all-heads-tied-odd-vocab": (
        "llama",
        {"num_key_value_heads": 8, "tie_word_embeddings": True, "vocab_size": 251},
    ),
    "llama3-rope": ("llama", _rope("llama3", 8.0, 32, low_freq_factor=1.0, high_freq_factor=4.0)),
    "llama-yarn": ("llama", _rope("yarn", 4.0, 64)),
    "mistral-window-5": ("mistral", {"sliding_window": 5}),
    "mistral-window-24": ("mistral", {"sliding_window": 24}),
    "qwen2-window-6": ("qwen2", _window(6, full_layers=2)),
    "qwen2-tied-window-20": ("qwen2", {"tie_word_embeddings": True} | _window(20, full_layers=1)),
    "qwen3-window-9": ("qwen3", _window(9, full_layers=2)),
}

LAYOUTS = {
    "TP1": Layout(),
    "TP2": Layout(tensor=2),
    "TP2-SP": Layout(tensor=2, sequence_parallel=True),
    "PP2": Layout(pipeline=2),
    "PP2-VP2": Layout(pipeline=2, virtual_pipeline=2),
    "TP2-PP2": Layout(tensor=2, pipeline=2),
    "TP2-SP-PP2": Layout(tensor=2, pipeline=2, sequence_parallel=True),
    "TP2-SP-PP2-VP2": Layout(tensor=2, pipeline=2, virtual_pipeline=2, sequence_parallel=True),
}

DEFAULT_LAYOUTS = ("PP2-VP2", "TP2-SP")
"""Without `make test-all`: each kind of parallelism in one layout."""

SETTINGS = [(recompute, share) for recompute in RECOMPUTE for share in (True, False)]


def _random_pairs(vocab_size: int) -> list[Pair]:
    random = np.random.default_rng(5)
    return [
        Pair(index, *(random.integers(0, vocab_size, n, dtype=np.int32) for n in lengths))
        for index, lengths in enumerate(LENGTHS_P3)
    ]


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny checkpoints on disk, created on first use."""
    directories: dict[str, Path] = {}

    def create(model: str) -> Path:
        if model not in directories:
            family, overrides = MODELS[model]
            directories[model] = tmp_path_factory.mktemp(model)
            settings = {"num_key_value_heads": 2} | overrides
            write_tiny_hf_model(directories[model], family, seed=3, **settings)
        return directories[model]

    return create


@pytest.fixture(scope="session")
def expected(model_directory: Callable[[str], Path]) -> Callable[[str], Answer]:
    """What Transformers computes for the random pairs."""
    answers: dict[str, Answer] = {}

    def compute(model: str) -> Answer:
        if model not in answers:
            directory = model_directory(model)
            answers[model] = single_answer(directory, _random_pairs(_vocab_size(directory)))
        return answers[model]

    return compute


def _vocab_size(directory: Path) -> int:
    size: int = json.loads((directory / "config.json").read_text())["vocab_size"]
    return size


def _random_run(directory: Path, recompute: str, share_prompt: bool) -> Run:
    pairs = _random_pairs(_vocab_size(directory))
    return Run(directory, pairs, ROW_TOKENS[share_prompt], share_prompt, recompute)


def _check(workers: WorkerPool, layout: Layout, cases: dict[str, tuple[Run, Answer]]) -> None:
    """Run all cases in one call and compare each with its expected answer."""
    runs = [run for run, _ in cases.values()]
    ranks = workers.run(packed_answers, layout.model_ranks, layout, runs, timeout_s=300)
    worst_logp = worst_gradient = 0.0
    for index, (name, (_, truth)) in enumerate(cases.items()):
        parts = [rank[index] for rank in ranks]
        logps = {pair: value for part in parts for pair, value in part.logps.items()}
        gradients = {key: value for part in parts for key, value in part.gradients.items()}
        assert logps.keys() == truth.logps.keys(), name
        assert gradients.keys() == truth.gradients.keys(), name
        for pair, logps_2 in truth.logps.items():
            difference_2 = (logps[pair] - logps_2).abs()
            allowed_2 = (LOGP_RELATIVE * logps_2.abs()).clamp(min=LOGP_ABSOLUTE)
            assert (difference_2 <= allowed_2).all(), f"{name}: pair {pair}: {difference_2}"
            worst_logp = max(worst_logp, difference_2.max().item())
        for key, gradient in truth.gradients.items():
            relative = ((gradients[key] - gradient).norm() / gradient.norm()).item()
            assert relative <= GRADIENT_RELATIVE, f"{name}: {key}: {relative:.2e}"
            worst_gradient = max(worst_gradient, relative)
    print(f"worst: {worst_logp:.1e} nats a sequence, {worst_gradient:.1e} of a gradient")


def test_rows_include_every_kind():
    """The cases below depend on these kinds of rows, which a change of packing may remove."""
    for share_prompt, row_tokens in ROW_TOKENS.items():
        rows = packed_rows(_random_pairs(251), row_tokens, share_prompt=share_prompt)
        assert 0 in (row.num_pairs for row in rows[:-1])
        assert len({row.num_pairs for row in rows}) >= 3
        assert any((row.tokens_T[: row.used_tokens] == PAD_TOKEN).any() for row in rows)
    assert ROW_TOKENS[True] in LENGTHS_P3.sum(1)
    assert LENGTHS_P3[:, 0].min() == 1 and LENGTHS_P3[:, 0].max() >= 0.59 * ROW_TOKENS[True]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=[] if name in DEFAULT_LAYOUTS else pytest.mark.exhaustive)
        for name in LAYOUTS
    ],
)
def test_packed_rows_equal_single_sequences(layout, workers, model_directory, expected):
    # A Latin square: every model and every setting in every layout, every model in every setting.
    cases = {}
    for index, model in enumerate(MODELS):
        recompute, share_prompt = SETTINGS[(index + list(LAYOUTS).index(layout)) % len(SETTINGS)]
        run = _random_run(model_directory(model), recompute, share_prompt)
        cases[f"{model} {recompute=} {share_prompt=}"] = run, expected(model)
    _check(workers, LAYOUTS[layout], cases)


@pytest.mark.distributed
@pytest.mark.exhaustive
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_combination_equals_single_sequences(
    layout, model, workers, model_directory, expected
):
    cases = {
        f"{recompute=} {share_prompt=}": (
            _random_run(model_directory(model), recompute, share_prompt),
            expected(model),
        )
        for recompute, share_prompt in SETTINGS
    }
    _check(workers, LAYOUTS[layout], cases)


# ---- from messages to rows -----------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROLES = ("user", "assistant")


def _chat(*turns: str, system: str | None = None) -> dict[str, Any]:
    """A record: the turns in order; the last two are chosen and rejected."""
    messages = [{"role": ROLES[i % 2], "content": turn} for i, turn in enumerate(turns[:-2])]
    answers = ([{"role": "assistant", "content": turn}] for turn in turns[-2:])
    start = [] if system is None else [{"role": "system", "content": system}]
    return dict(zip(("prompt", "chosen", "rejected"), (start + messages, *answers), strict=True))


CHATS = [
    _chat("Hi.", "Yes.", "No."),
    _chat(
        "What is the capital of France?",
        "The capital of France is Paris.",
        "Is the sea blue there?",
        "Paris is not by the sea, but the sky is blue today.",
        "The sea is a deep green.",
        system="Say it in another way.",
    ),
    _chat("12", "34", "567", "8", "And then?", "Perhaps 90.", "I do not know what you mean. " * 6),
    _chat("Human: how are you?", "I am well, thank you. " * 5, "Assistant: you?"),
]


def _check_chats(
    workers: WorkerPool,
    layout: Layout,
    directory: Path,
    tokenizer_path: str,
    records: list[dict[str, Any]],
    max_length: int,
    scratch: Path,
) -> int:
    """Read, tokenize, pack and compare; Transformers tokenizes independently.

    Returns the number of pairs that `max_length` truncates.
    """
    from transformers import AutoTokenizer

    path = scratch / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    dataset = load_pairs(
        [SourceConfig(path=str(path))],
        load_tokenizer(tokenizer_path, CHATML),
        TokenOptions(max_length=max_length),
        cache=scratch / "cache",
        num_workers=1,
    )
    pairs = [dataset[index] for index in range(len(dataset))]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    num_truncated = 0
    for pair in pairs:
        record = records[int(dataset.location(pair.index).rpartition(":")[2]) - 1]
        whole = [
            tokenizer.apply_chat_template(
                record["prompt"] + record[answer], chat_template=CHATML, return_dict=False
            )
            for answer in ("chosen", "rejected")
        ]
        for tokens, answer in zip(whole, (pair.chosen_tokens, pair.rejected_tokens), strict=True):
            assert [*pair.prompt_tokens, *answer] == tokens[:max_length]
        num_truncated += max(map(len, whole)) > max_length
    truth = single_answer(directory, pairs)
    longest = int(pair_tokens(dataset.lengths_P3, share_prompt=False).max())
    row_tokens = longest + longest % 2  # even, for sequence parallelism
    cases = {
        f"{share_prompt=}": (Run(directory, pairs, row_tokens, share_prompt, "uniform"), truth)
        for share_prompt in (True, False)
    }
    _check(workers, layout, cases)
    return num_truncated


@pytest.mark.distributed
def test_chats_with_several_turns_and_truncated_answers(workers, text_tokenizer_path, tmp_path):
    directory = write_tiny_hf_model(
        tmp_path / "model", "mistral", vocab_size=512, sliding_window=30
    )
    layout = Layout(tensor=2, sequence_parallel=True)
    num_truncated = _check_chats(
        workers, layout, directory, text_tokenizer_path, CHATS, 64, tmp_path
    )
    assert num_truncated >= 1


SHARED = Path(__file__).parents[4] / "shared"
STORIES = SHARED / "models" / "stories260K"
HARMLESS = SHARED / "data" / "hh_harmless_base_test.jsonl"


@pytest.mark.distributed
@pytest.mark.skipif(
    not (STORIES.is_dir() and HARMLESS.is_file()), reason="needs shared model and chats"
)
def test_real_chats_with_real_weights(workers, tmp_path):
    with HARMLESS.open() as file:
        records = [json.loads(line) for _, line in zip(range(4), file, strict=False)]
    layout = Layout(pipeline=2, pipeline_layers=(2, 3))
    assert _check_chats(workers, layout, STORIES, str(STORIES), records, 256, tmp_path) >= 1
