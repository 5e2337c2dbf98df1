"""The section `export`: what is written at the end of a run, and published."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator

from megatron_idpo.config.section import Bool, Section, Text
from megatron_idpo.errors import Problem

LICENSES = tuple(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
    c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl
    ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0
    odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2
    llama3.3 llama4 grok2-community gemma unknown other
    """.split()
)
"""Those that the hub accepts, from the message with which it refuses an upload with another one
(https://github.com/huggingface/huggingface_hub/issues/4218)."""


_HUB_CACHE = "models--"
"""Beginning of the name of a model's directory in the hub's cache."""


def hub_name(model: str) -> str | None:
    """The name of a model on the hub; None for a directory that is not in the hub's cache.

    Args:
        model: `model.path`: a name, or a directory.
    """
    if not Path(model).is_dir():
        return model
    for part in Path(model).resolve().parts:
        if part.startswith(_HUB_CACHE):
            return part.removeprefix(_HUB_CACHE).replace("--", "/")
    return None


def _check_license(value: object) -> object:
    if not isinstance(value, str) or value in LICENSES:
        return value
    near = difflib.get_close_matches(value.lower().replace(" ", "-"), LICENSES, n=1)
    hint = f"did you mean `{near[0]}`? For" if near else "the hub has no such identifier; for"
    raise ValueError(f"{hint} a license that the hub does not list set other, and license_name")


class ExportConfig(Section):
    """What is exported at the end (`training.export`), and published."""

    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """The dtype of the exported model; null is `model.dtype`. A model that is trained in fp32 is
    twice as large as its bf16 base."""

    base_model: Text | None = None
    """The base model's name on the hub, for the model card and the adapter. Null is `model.path`: a
    hub name, or a path relative to the export."""

    license: Annotated[Text, BeforeValidator(_check_license)] | None = None
    """The license in the model card, by the hub's identifier (`apache-2.0`, `other`); null is that
    of the base model's card, if it has one."""

    license_name: Text | None = None
    """With `license: other`: the license's name, such as `qwen-research`."""

    license_link: Text | None = None
    """With `license: other`: its address, or the name of a file next to the model, as `LICENSE`."""

    push_to_hub: Text | None = None
    """A repository, `organization/name`, to upload the model to; the adapter to `NAME-adapter`."""

    private: Bool = True
    """Whether a repository that does not exist yet is created as a private one."""

    used_with: ClassVar = {
        "private": ("push_to_hub",),
        "license_name": ("license", "other"),
        "license_link": ("license", "other"),
    }

    @property
    def adapter_repository(self) -> str:
        """Where the adapter is uploaded to, next to the merged model."""
        return f"{self.push_to_hub}-adapter"

    def problems(self) -> Iterator[Problem]:
        """A name that is not that of a repository; a license without a name."""
        if self.push_to_hub is not None and self.push_to_hub.count("/") != 1:
            yield Problem("push_to_hub", f"is {self.push_to_hub}", "write organization/name")
        if self.license == "other" and self.license_name is None:
            message = "is null, but license is other, for which the hub needs a name"
            yield Problem("license_name", message, "set it, and license_link")
