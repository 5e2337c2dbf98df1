"""Export of a trained policy: a Hugging Face model, and a PEFT adapter."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.convert.hf_io.tokenizer_files import read_json_object
from megatron_idpo.convert.megatron_to_hf import export_hf
from megatron_idpo.convert.model_source import ModelSource
from megatron_idpo.data.tokenize.tokenizers import read_template
from megatron_idpo.lora.adapters import merged_value
from megatron_idpo.lora.peft import save_peft
from megatron_idpo.mcore.parallel.world import broadcast_from_rank0, raise_on_all_ranks
from megatron_idpo.train.policy import Policy
from megatron_idpo.train.run_directory import RunDirectory

CHAT_TEMPLATE = "chat_template.jinja"
"""Transformers reads a tokenizer's chat template from this file first."""


def export_result(
    config: RunConfig,
    policy: Policy,
    output: RunDirectory,
    *,
    with_adapter: bool = True,
    show_progress: bool,
) -> list[str]:
    """Write `hf/`, with adapters merged in fp32, and with LoRA `adapter/`. Collective.

    An earlier export of this run is replaced atomically.

    Args:
        config: of the run.
        policy: trained.
        output: the run's directory.
        with_adapter: write the adapter too. False if its base is not the configured model: PEFT
            would apply it to the wrong weights.
        show_progress: draw a progress bar.

    Returns:
        Lines that say where the results are and how to use them.

    Raises:
        CheckpointError: on every rank; it cannot be written, and no incomplete export is left.
    """
    architecture, adapters = policy.source.architecture, policy.adapters
    with companions_of(config, policy.source) as companions:
        export_hf(
            policy.chunks,
            architecture,
            companions,
            output.hf,
            dtype=config.model.torch_dtype(),
            overwrite=True,
            show_progress=show_progress,
            value=None if adapters is None else merged_value(adapters),
            checksums=True,
        )
    lines = [f"model    {output.hf}"]
    if adapters is not None and with_adapter:
        save_peft(adapters, architecture, output.adapter, base_model=config.model.path)
        lines.append(f"adapter  {output.adapter}")
    return [*lines, "try it:", broadcast_from_rank0(lambda: f"  {_command(output.hf)}")]


def has_chat_template(model: Path) -> bool:
    """Whether an exported model's tokenizer has a chat template."""
    if (model / CHAT_TEMPLATE).is_file():
        return True
    settings = model / "tokenizer_config.json"
    return settings.is_file() and "chat_template" in read_json_object(settings)


@contextmanager
def companions_of(config: RunConfig, source: ModelSource) -> Iterator[tuple[Path, ...]]:
    """The base model's companion files, with the chat template of the training data. Collective.

    Prompts must be formatted as in training, so a configured template replaces the base model's.
    """
    with raise_on_all_ranks("reading the chat template"):
        text = read_template(config.data.chat_template)
    if text is None:
        yield source.companions
        return
    with TemporaryDirectory() as directory:
        path = Path(directory) / CHAT_TEMPLATE
        path.write_text(text, encoding="utf-8")
        kept = (file for file in source.companions if not file.name.startswith("chat_template"))
        yield (*kept, path)


def _command(model: Path) -> str:
    """A shell command that generates text with the exported model."""
    prompt, answer = '"Why is the sky blue?"', "[0]"
    if has_chat_template(model):
        prompt = f'[{{"role": "user", "content": {prompt}}}]'
        answer = '[0]["generated_text"][-1]["content"]'
    code = (
        "from transformers import pipeline; "
        f'print(pipeline("text-generation", "{model}")({prompt}, max_new_tokens=100){answer})'
    )
    return f"python -c {shlex.quote(code)}"
