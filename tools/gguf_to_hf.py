"""Converts a GGUF model with a byte-level tokenizer to a Hugging Face checkpoint.

Transformers reads the file and unpacks the weights. This module adds what a GGUF file does not
contain: the tokenizer's digit splitting, the context length and the exact epsilon of the norms. It
also removes fields that the loader adds to the saved configuration. Used by `tools/smollm2.py`.
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
    """Write weights, configuration, chat template and tokenizer as Transformers saves them.

    Args:
        gguf: the model with its tokenizer.
        directory: an existing directory.
        dtype: `bf16` or `fp32`.
        context_tokens: the model's context length.
        rms_norm_eps: the original value.

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
            trust_remote_code=False,
            # Quantized weights can be neither saved nor trained.
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=getattr(torch, _TORCH_NAMES[dtype]),
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        gguf.parent, trust_remote_code=False, **location
    )
    split_digits(tokenizer)
    tokenizer.model_max_length = context_tokens
    for added in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(added, None)
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
    """Make every digit a separate token, before the tokenizer's other splitting."""
    from tokenizers.pre_tokenizers import Digits, Sequence

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])


def answer_of(directory: Path, question: str) -> str:
    """Load the checkpoint with Transformers and ask it a question.

    Returns:
        The first tokens of the greedy answer.

    Raises:
        CheckpointError: the tokenizer does not split digits, or changes a text.
    """
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False
    )
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
    """Check that digits are single tokens and that a text survives encoding and decoding.

    Raises:
        CheckpointError: one of them fails.
    """
    tokens = tokenizer.tokenize(_DIGITS)
    multi_digit = [token for token in tokens if any(map(str.isdigit, token)) and len(token) > 1]
    decoded = tokenizer.decode(tokenizer.encode(_DIGITS))
    if multi_digit or decoded != _DIGITS:
        message = f"splits {_DIGITS!r} into {tokens}, which decode to {decoded!r}"
        raise CheckpointError.at("the tokenizer", message)
