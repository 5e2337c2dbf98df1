"""The verb `init`: a commented configuration to start from."""

import argparse
from importlib.resources import files
from pathlib import Path

from megatron_idpo.cli.arguments import one_of
from megatron_idpo.errors import ConfigError

KINDS = ("lora", "full", "sdpo", "paper", "long")
"""Each is `templates/KIND.yaml`."""


def add_init_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    meaning = "lora (default): adapters; full: all weights on several GPUs; sdpo: stepwise DPO; "
    meaning += "paper: the intermediate-DPO paper's run; long: long pairs"
    parser.add_argument(
        "kind", nargs="?", default="lora", type=one_of("kind", KINDS), metavar="KIND", help=meaning
    )
    default = Path("idpo.yaml")
    meaning = f"the file to write (default: {default}); an existing one is not replaced"
    parser.add_argument("file", nargs="?", default=default, type=Path, metavar="FILE", help=meaning)


def template(kind: str) -> str:
    """The text of a configuration."""
    return (files("megatron_idpo.cli") / "templates" / f"{kind}.yaml").read_text(encoding="utf-8")


def init(arguments: argparse.Namespace) -> int:
    """Write the file; returns the exit code.

    Raises:
        ConfigError: it exists, or cannot be written.
    """
    file: Path = arguments.file
    remedy = "name a file in a directory that can be written"
    with ConfigError.on_os_error(str(file), "cannot be written", remedy):
        try:
            with file.open("x", encoding="utf-8") as opened:
                opened.write(template(arguments.kind).replace("idpo.yaml", str(file)))
        except FileExistsError:
            message, other = "exists, and is not replaced", f"megatron-idpo init {arguments.kind} "
            raise ConfigError.at(str(file), message, f"name another: {other}FILE") from None
    print(f"{file}: set model.path and data.train, then: megatron-idpo doctor {file}")
    return 0
