"""Which keys of a config.json Transformers' code of a family never reads.

Such a key cannot change what Transformers computes. The answer comes from the installed
Transformers itself: a key is read if the family's config class has it, or if the family's code or
the shared code that a causal language model runs names it.
"""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_SHARED_CODE = (
    "activations.py",
    "cache_utils.py",
    "configuration_utils.py",
    "core_model_loading.py",
    "integrations/flash_attention.py",
    "integrations/flex_attention.py",
    "integrations/moe.py",
    "integrations/sdpa_attention.py",
    "masking_utils.py",
    "modeling_layers.py",
    "modeling_rope_utils.py",
    "modeling_utils.py",
    "utils/output_capturing.py",
)
"""Transformers' modules that read the config of a causal language model in its forward pass or
while its weights are loaded. Generation's are not among them: its settings do not change logits."""


def is_unread(key: str, family: str) -> bool:
    """Whether Transformers' code of a family never reads a key of its config.json.

    Args:
        key: any name.
        family: a `model_type` that Transformers knows.
    """
    from transformers import CONFIG_MAPPING

    if hasattr(CONFIG_MAPPING[family], key):
        return False
    # `config.key`, or the key as a string, for `getattr` and `kwargs.pop`.
    mention = re.compile(rf"""(?:config\.|["']){re.escape(key)}(?![\w])""")
    return mention.search(_code(family)) is None


@cache
def _code(family: str) -> str:
    """The source of the family and of the shared modules."""
    spec = find_spec("transformers")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    own = sorted((root / "models" / family).glob("*.py"))
    shared = [path for name in _SHARED_CODE if (path := root / name).is_file()]
    return "\n".join(path.read_text(encoding="utf-8") for path in (*own, *shared))
