"""Two models answer the same question, side by side.

    python tools/compare_answers.py MODEL OTHER QUESTION [--max-tokens 120]

Hugging Face directories or hub names. Greedy decoding with each model's own chat template, in fp32
on the CPU, so that results are reproducible. The last step of `make quickstart`.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_idpo.errors import EXIT_USER_ERROR, CheckpointError, UserError

MAX_TOKENS: Final = 120
"""Default length of an answer."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print both answers; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("other")
    parser.add_argument("question")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help=f"default: {MAX_TOKENS}")
    arguments = parser.parse_args(argv)
    names = (arguments.model, arguments.other)
    try:
        answers = [answer(name, arguments.question, arguments.max_tokens) for name in names]
    except UserError as error:
        print(f"compare_answers: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    show(Console(highlight=False), arguments.question, dict(zip(names, answers, strict=True)))
    return 0


def answer(model_name: str, question: str, max_tokens: int = MAX_TOKENS) -> str:
    """A model's greedy answer.

    Args:
        model_name: a directory or hub name.
        question: one user message.
        max_tokens: a longer answer is cut and ends with `[...]`.

    Raises:
        CheckpointError: the model cannot be loaded.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_name, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            model_name, dtype=torch.float32, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError.at(model_name, f"cannot be loaded: {reason}") from None
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    generated = model.generate(**prompt, max_new_tokens=max_tokens, do_sample=False)
    tokens = generated[0, prompt["input_ids"].shape[1] :].tolist()
    text = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    return text if tokens[-1] == tokenizer.eos_token_id else f"{text} [...]"


def show(console: Console, question: str, answers: dict[str, str]) -> None:
    """Prints the question, and the answers in columns headed by their models' names."""
    console.print(Text(f"Question: {question}", style="bold"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    for name in answers:
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*map(Text, answers.values()))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
