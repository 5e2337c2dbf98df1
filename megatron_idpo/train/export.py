"""Export of a trained policy: a Hugging Face model, and a PEFT adapter."""

import json
import logging
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

import torch

from megatron_idpo.config.data import torch_dtype
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.convert.hf_io.end_tokens import TOKENIZER_CONFIG_FILE, with_end_tokens
from megatron_idpo.convert.hf_io.tokenizer_files import (
    CONFIG_FILE,
    SENTENCEPIECE_FILE,
    TOKENIZER_FILES,
    read_json_object,
)
from megatron_idpo.convert.megatron_to_hf import export_hf
from megatron_idpo.convert.model_source import ModelSource
from megatron_idpo.data.run_pairs import tokenizer_path
from megatron_idpo.data.tokenize.answer_end import answer_end
from megatron_idpo.data.tokenize.tokenizers import Tokenizer, load_tokenizer, read_template
from megatron_idpo.errors import CheckpointError
from megatron_idpo.lora.adapters import KEPT_SHARE, merged_value, surviving_share
from megatron_idpo.lora.peft import save_peft
from megatron_idpo.mcore.parallel.world import broadcast_from_rank0, is_rank0, raise_on_all_ranks
from megatron_idpo.train.hub import push
from megatron_idpo.train.model_card import CARD, PICTURE, Kind, model_card, public_base_model
from megatron_idpo.train.policy import Policy
from megatron_idpo.train.run_directory import RunDirectory

logger = logging.getLogger(__name__)

CHAT_TEMPLATE = "chat_template.jinja"
"""Transformers reads a tokenizer's chat template from this file first."""


def export_result(
    config: RunConfig,
    policy: Policy,
    output: RunDirectory,
    *,
    step: int | None = None,
    with_adapter: bool = True,
    metrics: Mapping[str, float] = MappingProxyType({}),
    show_progress: bool,
) -> list[str]:
    """Write `hf/`, with adapters merged in fp32, and with LoRA `adapter/`. Collective.

    Each with a model card. The result of the run is uploaded if configured.

    An earlier export of this run is replaced atomically.

    Args:
        config: of the run.
        policy: trained.
        output: where to write them.
        step: of sDPO, if this is not the result of the whole run.
        with_adapter: write the adapter too. False if its base is not the configured model: PEFT
            would apply it to the wrong weights.
        metrics: of the held-out pairs against `model.path`, for the card; empty if there are none.
        show_progress: draw a progress bar.

    Returns:
        Lines that say where the results are and how to use them.

    Raises:
        CheckpointError: on every rank; it cannot be written or uploaded. No incomplete export is
            left, and a failed upload leaves the complete one.
    """
    architecture, adapters = policy.source.architecture, policy.adapters
    dtype = torch_dtype(config.export.dtype or config.model.dtype)
    with companions_of(config, policy.source) as companions, TemporaryDirectory() as temporary:
        cards = _Cards(
            config,
            metrics,
            step,
            has_chat_template(companions),
            _draw_layers(output, Path(temporary)),
            Path(temporary),
        )
        export_hf(
            policy.chunks,
            architecture,
            (*companions, *cards.files(output.hf, "model")),
            output.hf,
            dtype=dtype,
            overwrite=True,
            show_progress=show_progress,
            value=None if adapters is None else merged_value(adapters, dtype),
            checksums=True,
        )
        lines = [f"model    {output.hf}"]
        if adapters is not None:
            lines += _lost_in_merging(surviving_share(adapters, dtype), dtype)
        if adapters is not None and with_adapter:
            # Its tokenizer and end tokens: those of the base model may be others.
            kept = [file for file in companions if file.name != CONFIG_FILE]
            kept += cards.files(output.adapter, "adapter")
            base_model = _base_model(config, output.adapter)
            save_peft(adapters, architecture, output.adapter, base_model, companions=kept)
            lines.append(f"adapter  {output.adapter}")
    if step is None:
        lines += _upload(config, output, with_adapter=adapters is not None and with_adapter)
    return [*lines, "try it:", broadcast_from_rank0(lambda: f"  {_command(output.hf)}")]


@dataclass(frozen=True)
class _Cards:
    """What the model cards of an export have in common."""

    config: RunConfig
    metrics: Mapping[str, float]
    step: int | None
    has_chat_template: bool
    picture: Path | None
    root: Path
    """Temporary directory."""

    def files(self, directory: Path, kind: Kind) -> list[Path]:
        """Write the card of one directory, and list it with its picture. Collective.

        Only rank 0, which copies the files, has some.
        """
        with raise_on_all_ranks("writing the model card"):
            if not is_rank0():
                return []
            text = model_card(
                self.config,
                _base_model(self.config, directory),
                kind,
                self.metrics,
                step=self.step,
                has_chat_template=self.has_chat_template,
                has_picture=self.picture is not None,
            )
            return _write_card(text, self.root / kind, self.picture)


def _upload(config: RunConfig, output: RunDirectory, *, with_adapter: bool) -> list[str]:
    """Upload the result if that is configured; returns a line for each repository. Collective."""
    if (repository := config.export.push_to_hub) is None:
        return []
    uploads = {repository: output.hf}
    if with_adapter:
        uploads[config.export.adapter_repository] = output.adapter
    for name, directory in uploads.items():
        push(name, directory, private=config.export.private)
    return [f"uploaded {name}" for name in uploads]


def _lost_in_merging(share: float, dtype: torch.dtype) -> list[str]:
    """A line, if rounding the merged weights loses a part of what the adapter learned."""
    if share > KEPT_SHARE:
        return []
    name = str(dtype).removeprefix("torch.")
    line = (
        f"         has {share:.0%} of the adapter's change: merged weights are rounded to {name};"
    )
    return [f"{line} export.dtype=fp32 and the adapter have all of it"]


def _base_model(config: RunConfig, directory: Path) -> str:
    return public_base_model(config.model.path, config.export.base_model, directory)


def _write_card(text: str, directory: Path, picture: Path | None) -> list[Path]:
    """The model card of an export with its picture, as companion files."""
    directory.mkdir()
    card = directory / CARD
    card.write_text(text, encoding="utf-8")
    return [card] if picture is None else [card, picture]


def _draw_layers(output: RunDirectory, directory: Path) -> Path | None:
    """The curves of every layer, for the card; None on other ranks, and if nothing was logged."""
    if not (is_rank0() and output.metrics.is_file() and output.metrics.stat().st_size):
        return None
    # Only rank 0 draws: importing matplotlib takes most of a second on a core.
    from megatron_idpo.train.metrics.curves import LAYER_CHARTS, draw_curves

    draw_curves(output.metrics, directory / PICTURE, pictured=LAYER_CHARTS, columns=1)
    return directory / PICTURE


def has_chat_template(files: Iterable[Path]) -> bool:
    """Whether there is a chat template in the files of a tokenizer."""
    by_name = {file.name: file for file in files}
    settings = by_name.get(TOKENIZER_CONFIG_FILE)
    if CHAT_TEMPLATE in by_name or settings is None:
        return CHAT_TEMPLATE in by_name
    return "chat_template" in read_json_object(settings)


@contextmanager
def companions_of(config: RunConfig, source: ModelSource) -> Iterator[tuple[Path, ...]]:
    """The base model's companion files, for a model that was trained on this data. Collective.

    A configured tokenizer replaces the base model's, which gives texts other tokens. Prompts must
    be formatted as in training, so a configured template replaces the base model's too.
    Answers must end as in training, so the end tokens of the training data are added to those of
    the base model.

    Raises:
        CheckpointError, DataError: on every rank; a file or the tokenizer cannot be read.
    """
    with TemporaryDirectory() as directory:
        companions = source.companions
        with raise_on_all_ranks("reading the chat template and the tokenizer"):
            text = read_template(config.data.chat_template)
            if is_rank0():  # copies the files
                tokenizer = load_tokenizer(tokenizer_path(config.model), config.data.chat_template)
                companions = _with_tokenizer(companions, config.model.tokenizer, Path(directory))
                companions = _trained_companions(companions, Path(directory), tokenizer, text)
        yield companions


def _with_tokenizer(
    files: tuple[Path, ...], tokenizer: str | None, directory: Path
) -> tuple[Path, ...]:
    """The files with those of `model.tokenizer` instead of the base model's tokenizer.

    Args:
        files: of the base model.
        tokenizer: a directory, a `.model` file or a hub name; None keeps the base model's.
        directory: for a copy of a `.model` file under the name that Transformers looks for.

    Raises:
        CheckpointError: its files are not there any more.
    """
    if tokenizer is None:
        return files
    path = Path(tokenizer)
    if path.is_file():
        own = [directory / SENTENCEPIECE_FILE]
        shutil.copyfile(path, own[0])
        settings = path.with_name(TOKENIZER_CONFIG_FILE)  # `load_tokenizer` reads it too
        own += [settings] if settings.is_file() else []
    elif path.is_dir():
        own = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    else:
        from huggingface_hub import try_to_load_from_cache

        # Loading the tokenizer has downloaded them; an export does not need the network.
        cached = [try_to_load_from_cache(tokenizer, name) for name in TOKENIZER_FILES]
        own = [Path(file) for file in cached if isinstance(file, str)]
    if not own:
        message, remedy = "has no tokenizer files", "name the tokenizer that the run started with"
        raise CheckpointError.at(f"model.tokenizer {tokenizer}", message, remedy)
    return (*(file for file in files if file.name not in TOKENIZER_FILES), *own)


def _trained_companions(
    files: tuple[Path, ...], directory: Path, tokenizer: Tokenizer, template: str | None
) -> tuple[Path, ...]:
    """The files with the end tokens of the training data, and with the configured template.

    Args:
        files: of the base model.
        directory: for changed copies.
        tokenizer: of the training data, with its template.
        template: the configured one; None keeps the tokenizer's own.
    """
    end = answer_end(tokenizer)
    if tokenizer.has_chat_template and end.turn_end is None:
        logger.warning(
            "the chat template ends answers with %r, which is not a token: no file of the exported "
            "model can say where a chat answer ends; use a template whose end of turn is a token",
            end.written,
        )
    if template is None:
        return with_end_tokens(files, directory, end.tokens)
    path = directory / CHAT_TEMPLATE
    path.write_text(template, encoding="utf-8")
    kept = [file for file in files if not file.name.startswith("chat_template")]
    settings = next((file for file in kept if file.name == TOKENIZER_CONFIG_FILE), None)
    fields = {} if settings is None else read_json_object(settings)
    if settings is not None and "chat_template" in fields:
        # Other programs than Transformers read it here first.
        kept.remove(settings)
        kept.append(directory / TOKENIZER_CONFIG_FILE)
        text = json.dumps({**fields, "chat_template": template}, indent=2, ensure_ascii=False)
        kept[-1].write_text(text + "\n", encoding="utf-8")
    # The end of turn becomes the tokenizer's EOS, unless that changes the tokens of anything.
    writes_eos = "eos_token" in template or bool(fields.get("add_eos_token"))
    eos = end.turn_end_text if end.turn_end in tokenizer.special_ids and not writes_eos else None
    return with_end_tokens((*kept, path), directory, end.tokens, eos)


def _command(model: Path) -> str:
    """A shell command that generates text with the exported model."""
    prompt, answer = '"Why is the sky blue?"', "[0]"
    if has_chat_template(model.iterdir()):
        prompt = f'[{{"role": "user", "content": {prompt}}}]'
        answer = '[0]["generated_text"][-1]["content"]'
    code = (
        "from transformers import pipeline; "
        f'print(pipeline("text-generation", "{model}")({prompt}, max_new_tokens=100){answer})'
    )
    return f"python -c {shlex.quote(code)}"
