"""Judges that need no network: a reward model, or a language model with the judge's template.

A reward model scores each answer on its own, so the order of the answers does not matter. A
language model is asked in both orders, like a judge behind an endpoint; instead of generating text,
its probabilities of the next token being A and B are compared. Texts are never truncated: if one is
too long, the question gets no verdict.

One text per forward pass: with padding, the scores of equal answers would differ in their last
digits and not be ties.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from megatron_idpo.data.sources.preferences import common_prefix_length
from megatron_idpo.data.tokenize.tokenizers import load_tokenizer
from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.hf_model import load_hf_model
from megatron_idpo.evaluate.judge.comparison import Question
from megatron_idpo.evaluate.judge.template import OPENING, JudgeTemplate
from megatron_idpo.evaluate.judge.verdicts import Verdict
from megatron_idpo.storage.provenance import file_digest

LOCATION = "judge.model"
_IDENTIFYING = ("*.safetensors", "*.bin", "config.json", "tokenizer*", "chat_template.jinja")


class _UnreadableError(Exception):
    """The model cannot read a text; the message is the reason."""


def model_identity(path: str) -> str:
    """sha256 over the files of a local model; `hub` for a hub name, which is not resolved."""
    directory = Path(path).expanduser()
    if not directory.is_dir():
        return "hub"
    identity = hashlib.sha256()
    for file in sorted({file for glob in _IDENTIFYING for file in directory.glob(glob)}):
        identity.update(f"{file.name} {file_digest(file)}".encode())
    return identity.hexdigest()


class _LocalJudge(ABC):
    """A judge that scores both answers; the higher score wins."""

    def __init__(self, path: str, auto_class: Any) -> None:
        """Loads the model, on the GPU if there is one, in the format in which it is stored.

        Raises:
            UserError: it cannot be loaded, or lacks weights such as a reward model's head.
        """
        directory = str(Path(path).expanduser())
        self._tokenizer = load_tokenizer(directory)
        remedy = "name a complete model that fits judge.kind"
        model = load_hf_model(auto_class, directory, location=LOCATION, remedy=remedy, dtype="auto")
        self._model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def ask(self, questions: Sequence[Question], done: Callable[[Verdict], None]) -> None:
        """See `Judge.ask`."""
        for question in questions:
            try:
                scores = self._scores(question)
            except _UnreadableError as error:
                done(question.verdict(None, note=str(error)))
                continue
            first, second = scores.values()
            if not (math.isfinite(first) and math.isfinite(second)):
                done(question.verdict(None, note=f"the model's scores are {first} and {second}"))
            elif first == second:
                done(question.verdict("tie", scores=scores))
            else:
                done(question.verdict("A" if first > second else "B", scores=scores))

    @abstractmethod
    def _scores(self, question: Question) -> dict[str, float]:
        """Scores of the answer shown first and of the other one.

        Raises:
            _UnreadableError: the model cannot read an answer.
        """

    def _render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        """A conversation in the chat template of the judge.

        Raises:
            _UnreadableError: the template rejects it.
        """
        try:
            return self._tokenizer.render(messages, add_generation_prompt=add_generation_prompt)
        except (TemplateError, TypeError, ValueError) as error:
            raise _UnreadableError(f"the judge's chat template fails: {error}") from None

    def _tokenize(self, text: str) -> torch.Tensor:
        """Token ids [1, T] on the model's device.

        Raises:
            _UnreadableError: the text is longer than the model's context.
        """
        # A chat template has already written the special tokens.
        add_special = not self._tokenizer.has_chat_template
        [ids] = self._tokenizer.encode([text], special_tokens=add_special)
        limit = getattr(self._model.config, "max_position_embeddings", None)
        if limit is not None and len(ids) > limit:
            raise _UnreadableError(f"{len(ids)} tokens, but the judge reads {limit}")
        return torch.tensor([ids], device=self._model.device)


class RewardJudge(_LocalJudge):
    """A sequence classifier with one output, which is higher for a better answer."""

    def __init__(self, path: str) -> None:
        """Loads the model.

        Raises:
            UserError: it cannot be loaded, has several outputs, or has no chat template.
        """
        from transformers import AutoModelForSequenceClassification

        super().__init__(path, AutoModelForSequenceClassification)
        if self._model.config.num_labels != 1:
            message = f"{path} has {self._model.config.num_labels} outputs, a reward model has one"
            raise ConfigError.at(LOCATION, message, "name a reward model")
        if not self._tokenizer.has_chat_template:
            message = f"{path} has no chat template"
            raise ConfigError.at(LOCATION, message, "name a reward model with a chat template")

    def _scores(self, question: Question) -> dict[str, float]:
        return {"a": self._reward(question, question.a), "b": self._reward(question, question.b)}

    @torch.inference_mode()
    def _reward(self, question: Question, answer: str) -> float:
        prompt = question.prompt
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        conversation = [*turns, {"role": "assistant", "content": answer}]
        text = self._render(conversation, add_generation_prompt=False)
        return float(self._model(input_ids=self._tokenize(text)).logits.float().squeeze())


class LanguageModelJudge(_LocalJudge):
    """A causal language model that is given the judge's template."""

    def __init__(self, path: str, template: JudgeTemplate) -> None:
        """Loads the model.

        Raises:
            UserError: it cannot be loaded.
        """
        from transformers import AutoModelForCausalLM

        super().__init__(path, AutoModelForCausalLM)
        self._template = template

    @torch.inference_mode()
    def _scores(self, question: Question) -> dict[str, float]:
        """Log-probabilities of the letters A and B after "Verdict: "."""
        messages = self._template.messages(question.prompt, *question.shown)
        # In one user message: some chat templates reject system messages.
        text = "\n\n".join(message["content"] for message in messages)
        if self._tokenizer.has_chat_template:
            text = self._render([{"role": "user", "content": text}], add_generation_prompt=True)
        else:
            text += "\n\n"
        text += OPENING
        ids_a, ids_b = (self._tokenize(text + letter)[0].tolist() for letter in "AB")
        # The tokenizer may merge the letter with the text before it, so the letters are compared
        # at the first position where the two tokenizations differ.
        shared = common_prefix_length(ids_a, ids_b)
        if shared == 0 or ids_a[shared + 1 :] != ids_b[shared + 1 :]:
            message = f"after {OPENING!r}, A and B are not one token each"
            raise ConfigError.at(LOCATION, message, "name another judge")
        prefix_1T = torch.tensor([ids_a[:shared]], device=self._model.device)
        logits_V = self._model(input_ids=prefix_1T).logits[0, -1].float()
        logps_V = logits_V.log_softmax(-1)
        return {"A": float(logps_V[ids_a[shared]]), "B": float(logps_V[ids_b[shared]])}
