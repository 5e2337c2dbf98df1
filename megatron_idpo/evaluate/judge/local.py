"""Judges that need no network: a reward model, or a language model with the judge's template.

A reward model scores each answer by itself, so there is no first one and no order. A language model
is given both orders, like a judge behind an endpoint; instead of writing, it tells how likely it
would go on with A and with B. Neither ever cuts a text: what is too long has no verdict.

One text at a time: padding would make equal answers' scores differ in their last digits.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from megatron_idpo.data.tokenize.common_prefix import common_length
from megatron_idpo.data.tokenize.tokenizers import Tokenizer, load_tokenizer
from megatron_idpo.errors import CheckpointError, ConfigError
from megatron_idpo.evaluate.generate.answers import Prompt
from megatron_idpo.evaluate.hf_progress import without_bar
from megatron_idpo.evaluate.judge.question import Question
from megatron_idpo.evaluate.judge.template import Chat, JudgeTemplate, Letter
from megatron_idpo.evaluate.judge.verdicts import Verdict

PLACE = "judge.model"
_IDENTIFYING = ("*.safetensors", "*.bin", "config.json", "tokenizer*", "chat_template.jinja")


class _Unfit(Exception):
    """The model cannot read this text; the message says why."""


def model_identity(path: str) -> str:
    """sha256 of a local model's files; of a hub name, nothing but the name is known."""
    directory = Path(path).expanduser()
    if not directory.is_dir():
        return "hub"
    found = hashlib.sha256()
    for file in sorted({file for glob in _IDENTIFYING for file in directory.glob(glob)}):
        with file.open("rb") as opened:
            found.update(
                f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}".encode()
            )
    return found.hexdigest()


class RewardJudge:
    """A sequence classifier with a single output: the higher, the better the answer."""

    def __init__(self, path: str) -> None:
        """Load it.

        Raises:
            UserError: it cannot be loaded, or has several outputs.
        """
        from transformers import AutoModelForSequenceClassification

        self._model, self._tokenizer = _load(path, AutoModelForSequenceClassification)
        if self._model.config.num_labels != 1:
            message = f"{path} has {self._model.config.num_labels} outputs, a reward model has one"
            raise ConfigError.at(PLACE, message, "name a reward model")

    def ask(self, questions: Sequence[Question], done: Callable[[Verdict], None]) -> None:
        """See `Judge.ask`."""
        for question in questions:
            try:
                scores = [self._score(question.prompt, text) for text in (question.a, question.b)]
            except _Unfit as error:
                done(question.verdict(None, note=str(error)))
            else:
                done(_compared(question, dict(zip("ab", scores, strict=True))))

    @torch.inference_mode()
    def _score(self, prompt: Prompt, answer: str) -> float:
        if self._tokenizer.has_chat_template:
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            whole = [*turns, {"role": "assistant", "content": answer}]
            text = _rendered(self._tokenizer, whole, add_generation_prompt=False)
        elif isinstance(prompt, str):
            text = prompt + answer
        else:
            message = "has no chat template, but prompts are chat messages"
            raise ConfigError.at(PLACE, message, "name a reward model with one")
        ids_1T = _tokens(self._model, self._tokenizer, text)
        return float(self._model(input_ids=ids_1T).logits.float().squeeze())


class LanguageModelJudge:
    """A causal language model that is given the template."""

    def __init__(self, path: str, template: JudgeTemplate) -> None:
        """Load it.

        Raises:
            UserError: it cannot be loaded.
        """
        from transformers import AutoModelForCausalLM

        self._template = template
        self._model, self._tokenizer = _load(path, AutoModelForCausalLM)

    def ask(self, questions: Sequence[Question], done: Callable[[Verdict], None]) -> None:
        """See `Judge.ask`."""
        for question in questions:
            chat = self._template.chat(question.prompt, *question.shown)
            try:
                scores = self._log_probs(self._opened(chat) + self._template.opening)
            except _Unfit as error:
                done(question.verdict(None, note=str(error)))
            else:
                done(_compared(question, scores))

    def _opened(self, chat: Chat) -> str:
        """The question as the model reads it, up to its answer."""
        if not self._tokenizer.has_chat_template:
            return "".join(f"{turn['content']}\n\n" for turn in chat.messages())
        try:
            return _rendered(self._tokenizer, chat.messages(), add_generation_prompt=True)
        except _Unfit:
            # Some models know no system message: it goes before the user's.
            whole = Chat("", f"{chat.system}\n\n{chat.user}")
            return _rendered(self._tokenizer, whole.messages(), add_generation_prompt=True)

    @torch.inference_mode()
    def _log_probs(self, opened: str) -> dict[str, float]:
        """Of the tokens in which what follows would differ if it were A or B."""
        both = [_tokens(self._model, self._tokenizer, opened + letter) for letter in "AB"]
        a, b = (ids_1T[0].tolist() for ids_1T in both)
        shared = common_length(a, b)
        if shared == 0 or a[shared + 1 :] != b[shared + 1 :]:
            message = "is no place where A and B are a token each"
            remedy = f"set `opening` to other words than {self._template.opening!r}"
            raise ConfigError.at("judge.template", message, remedy)
        logits_V = self._model(input_ids=both[0][:, :shared]).logits[0, -1].float()
        logps_V = logits_V.log_softmax(-1)
        return {letter: float(logps_V[ids[shared]]) for letter, ids in (("A", a), ("B", b))}


def _compared(question: Question, scores: dict[str, float]) -> Verdict:
    """The higher of two scores wins; of equal ones none."""
    first, second = scores.values()
    if not (math.isfinite(first) and math.isfinite(second)):
        return question.verdict(None, note=f"the model's scores are {first} and {second}")
    letter: Letter = "tie" if first == second else "A" if first > second else "B"
    return question.verdict(letter, scores=scores)


def _load(path: str, kind: Any) -> tuple[Any, Tokenizer]:
    """A model and its tokenizer, on the GPU where there is one, in the format it is stored in.

    Raises:
        UserError: it cannot be loaded, or some weights are missing, such as a reward model's head
            in a model that is none.
    """
    location = str(Path(path).expanduser())
    tokenizer = load_tokenizer(location)
    try:
        with without_bar():
            model, info = kind.from_pretrained(location, dtype="auto", output_loading_info=True)
    # The library raises whatever the file at hand leads to.
    except Exception as error:
        message = f"{path} cannot be loaded: {type(error).__name__}: {error}"
        raise CheckpointError.at(PLACE, message, "name a model of judge.kind") from error
    if missing := sorted(info["missing_keys"]):
        message = f"{path} lacks {len(missing)} weights, {missing[0]} for one"
        raise CheckpointError.at(PLACE, message, "name a complete model of judge.kind")
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _rendered(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], *, add_generation_prompt: bool
) -> str:
    """A conversation as the judge's chat template writes it.

    Raises:
        _Unfit: the template refuses it.
    """
    try:
        return tokenizer.render(messages, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError, ValueError) as error:
        raise _Unfit(f"the judge's chat template fails: {error}") from None


def _tokens(model: Any, tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """Token ids [1, T] on the model's device; a chat template has written the special ones.

    Raises:
        _Unfit: the model cannot read so many.
    """
    [ids] = tokenizer.encode([text], special_tokens=not tokenizer.has_chat_template)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and len(ids) > longest:
        raise _Unfit(f"{len(ids)} tokens, but the judge reads {longest}")
    return torch.tensor([ids], device=model.device)
