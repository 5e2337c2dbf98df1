"""A byte-level GGUF model as a Hugging Face checkpoint, with what a GGUF file cannot say put right.

Transformers reads the file and unpacks the weights. The tokenizer's digit splitting and the length
of the context are in no GGUF file, float32 has rounded the norms' epsilon, and the loader leaves
traces of itself in what it saves. `tools/smollm2.py` says which model.
"""

import contextlib
import io
from pathlib import Path
from typing import Any

from megatron_idpo.errors import CheckpointError

_TORCH_NAMES = {"bf16": "bfloat16", "fp32": "float32"}
_SPECIAL = ("bos", "eos", "pad")
_DIGITS = "In 1984 there were 2,048 of 65536."


def convert(
    gguf: Path, directory: Path, *, dtype: str, context_tokens: int, rms_norm_eps: float
) -> None:
    """Writes weights, configuration, chat template and tokenizer as Transformers saves them.

    Args:
        gguf: the model, tokenizer included.
        directory: an existing directory.
        dtype: `bf16` or `fp32`.
        context_tokens: the longest text that the model was trained for.
        rms_norm_eps: as the model's authors wrote it.

    Raises:
        CheckpointError: the weights cannot be written.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    location = {"gguf_file": gguf.name, "local_files_only": True}
    with contextlib.redirect_stderr(io.StringIO()):  # another progress bar
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            **location,
            # Left packed, the weights can be neither saved nor trained.
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=getattr(torch, _TORCH_NAMES[dtype]),
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **location)
    split_digits(tokenizer)
    tokenizer.model_max_length = context_tokens
    for trace in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(trace, None)
    model.config.__dict__.pop("_model_name_or_path", None)
    model.config.rms_norm_eps = rms_norm_eps
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in _SPECIAL}
    for name, token_id in ids.items():
        setattr(model.config, name, token_id)
    model.generation_config = transformers.GenerationConfig(**ids)
    try:
        model.save_pretrained(directory)
    except SafetensorError as error:
        remedy = "free some space or name a directory on another disk"
        raise CheckpointError.at(
            str(directory), f"the weights cannot be written: {error}", remedy
        ) from None
    tokenizer.save_pretrained(directory)


def split_digits(tokenizer: Any) -> None:
    """Every digit becomes a token of its own; the tokenizer's other splitting comes after that."""
    from tokenizers.pre_tokenizers import Digits, Sequence

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])


def answer_of(directory: Path, question: str) -> str:
    """Loads the checkpoint as any user would and asks it.

    Returns:
        The first tokens of the greedy answer.

    Raises:
        CheckpointError: the tokenizer does not split digits, or changes a text.
    """
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    check_tokenizer(tokenizer)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    generated = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    prompt_tokens = prompt["input_ids"].shape[1]
    return str(tokenizer.decode(generated[0, prompt_tokens:], skip_special_tokens=True))


def check_tokenizer(tokenizer: Any) -> None:
    """Digits are single tokens, and a text comes back as it was.

    Raises:
        CheckpointError: not so.
    """
    tokens = tokenizer.tokenize(_DIGITS)
    whole = [token for token in tokens if any(map(str.isdigit, token)) and len(token) > 1]
    back = tokenizer.decode(tokenizer.encode(_DIGITS))
    if whole or back != _DIGITS:
        what = f"{_DIGITS!r} becomes {tokens} and comes back as {back!r}"
        raise CheckpointError.at("the tokenizer", what)
