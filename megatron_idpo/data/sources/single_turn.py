"""A question and two answers, all text, as one turn of a chat.

So most datasets of instructions are written that do not know TRL's messages; left as text, they
would be trained without the chat template that the model answers by.
"""

from typing import Any

from megatron_idpo.data.sources.raw_record import BadRecord, Message, kind_name


def from_single_turn(
    prompt: Any, chosen: Any, rejected: Any, system: Any
) -> tuple[list[Message], list[Message], list[Message]]:
    """The prompt as a user's message, the answers as the assistant's.

    Args:
        prompt: text that is not blank.
        chosen: text.
        rejected: text.
        system: text of a system message before the prompt; blank or None is none.

    Raises:
        BadRecord: one of them is something else.
    """
    if prompt is None:
        raise BadRecord("field 'prompt' is missing", "the format 'single_turn' has prompts")
    texts = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "system": system}
    for name, value in texts.items():
        if not isinstance(value, str) and not (name == "system" and value is None):
            message = f"'{name}' is {kind_name(value)}, not text"
            raise BadRecord(message, "the format is 'single_turn', which reads text only")
    if not prompt.strip():
        raise BadRecord("'prompt' is empty")
    before = [{"role": "system", "content": system}] if system and system.strip() else []
    asked = [*before, {"role": "user", "content": prompt}]
    first, second = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return asked, first, second
