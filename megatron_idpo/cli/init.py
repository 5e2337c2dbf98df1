"""The verb `init`: a commented configuration to start from, or one of the examples.

The examples and the quickstart's pairs are in the package (`examples` is a link to the checkout's
directory), so that an installed wheel has them too.
"""

import argparse
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from megatron_idpo.cli.arguments import one_of
from megatron_idpo.errors import ConfigError

KINDS = ("lora", "full", "sdpo", "paper", "long", "moe", "quickstart")
"""Each is `templates/KIND.yaml`."""

EXAMPLES = (
    "idpo_mistral_7b",
    "llama3_70b",
    "llama3_70b_128k",
    "llama3_70b_full",
    "llama3_8b",
    "llama3_8b_128k",
    "llama3_8b_full",
    "qwen2_5_7b",
    "sdpo_solar_10b",
    "solar_10_7b",
)
"""Each is `examples/NAME.yaml`."""

PLACEHOLDERS = {"model.path": "path/to/hf-model", "data.train": "pairs.jsonl"}
"""What a file has where the user's own model and pairs belong."""

DOCS = "https://github.com/megatron-idpo/megatron-idpo/blob/main/docs/"
_DATA_FILES = ("quickstart_train.jsonl", "quickstart_held_out.jsonl", "README.md")


def add_init_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    meaning = "lora (default): adapters; full: all weights on several GPUs; sdpo: stepwise DPO; "
    meaning += "paper: the intermediate-DPO paper's run; long: long pairs; moe: experts; "
    meaning += "quickstart: a small real run, with its pairs; or an example: "
    meaning += ", ".join(EXAMPLES)
    parser.add_argument(
        "kind",
        nargs="?",
        default="lora",
        type=one_of("kind", (*KINDS, *EXAMPLES)),
        metavar="KIND",
        help=meaning,
    )
    default = Path("idpo.yaml")
    meaning = f"the file to write (default: {default}); an existing one is not replaced"
    parser.add_argument("file", nargs="?", default=default, type=Path, metavar="FILE", help=meaning)


def template(kind: str, file: Path) -> str:
    """The text of a configuration that is written to `file`."""
    package = files("megatron_idpo")
    if kind in EXAMPLES:
        text = (package / "examples" / f"{kind}.yaml").read_text(encoding="utf-8")
        text = text.replace(f"examples/{kind}.yaml", str(file))
    else:
        text = (package / "cli" / "templates" / f"{kind}.yaml").read_text(encoding="utf-8")
        text = text.replace("idpo.yaml", str(file)).replace("DATA/", f"{data_directory(file)}/")
    return text.replace("docs/", DOCS)


def data_directory(file: Path) -> Path:
    """Where the pairs of `init quickstart FILE` are."""
    return file.parent / "quickstart_data"


def init(arguments: argparse.Namespace) -> int:
    """Write the file; returns the exit code.

    Raises:
        ConfigError: it exists, or cannot be written.
    """
    file, kind = arguments.file, arguments.kind
    remedy = "name a file in a directory that can be written"
    with ConfigError.on_os_error(str(file), "cannot be written", remedy):
        try:
            with file.open("x", encoding="utf-8") as opened:
                opened.write(template(kind, file))
        except FileExistsError:
            message, other = "exists, and is not replaced", f"megatron-idpo init {kind} "
            raise ConfigError.at(str(file), message, f"name another: {other}FILE") from None
        if kind == "quickstart":
            _copy_data(files("megatron_idpo") / "examples" / "data", data_directory(file))
    text = file.read_text(encoding="utf-8")
    to_set = [field for field, placeholder in PLACEHOLDERS.items() if placeholder in text]
    next_step = f"set {' and '.join(to_set)}, then" if to_set else "next"
    print(f"wrote {file}; {next_step}: megatron-idpo doctor {file}")
    return 0


def _copy_data(source: Traversable, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for name in _DATA_FILES:
        (target / name).write_bytes((source / name).read_bytes())
