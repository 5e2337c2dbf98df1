"""The verb `convert`: its arguments and the choice of the converter."""

import argparse
from dataclasses import replace
from pathlib import Path

from megatron_idpo.cli.arguments import add_choice
from megatron_idpo.errors import ConfigError
from megatron_idpo.storage.atomic import check_target

DTYPES = ("fp32", "bf16", "fp16")
_LAYOUT_FIELDS = ("tensor", "pipeline", "virtual_pipeline", "expert", "pipeline_layers")


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_choice(parser, "direction", ["hf-to-megatron", "megatron-to-hf"], help="the direction")
    parser.add_argument("input", type=Path, metavar="INPUT", help="directory of the checkpoint")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="directory to write")
    add_choice(parser, "--dtype", DTYPES, help="dtype of the weights (default: as stored)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    meaning = "how to split the work; the result does not depend on it"
    split = parser.add_argument_group("under torchrun", meaning)
    for name, meaning in (
        ("tensor", "ranks that share every weight matrix"),
        ("pipeline", "pipeline stages"),
        ("virtual-pipeline", "model chunks per stage"),
        ("expert", "ranks that share the experts"),
    ):
        split.add_argument(f"--{name}", type=int, metavar="N", help=f"{meaning} (default: 1)")
    meaning = "layers of each virtual stage, if they do not divide evenly"
    split.add_argument("--pipeline-layers", type=_counts, metavar="N,N,...", help=meaning)
    other = parser.add_argument_group("model families without support in this package")
    meaning = "bridge uses Megatron-Bridge (needs Transformer Engine and a GPU)"
    add_choice(other, "--backend", ["own", "bridge"], default="own", help=meaning)
    meaning = "with --backend bridge, megatron-to-hf: the original model of the checkpoint"
    other.add_argument("--hf-model", type=Path, metavar="DIR", help=meaning)


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        message = f"cannot parse {text!r}; expected a list such as 3,2"
        raise argparse.ArgumentTypeError(message) from None


def _convert_by_bridge(arguments: argparse.Namespace) -> int:
    from megatron_idpo.checkpoint.dcp_metadata import FILE, read_dcp_metadata
    from megatron_idpo.checkpoint.dtypes import parse_dtype
    from megatron_idpo.mcore.model.bridge import bridge_export, bridge_import, directories_of

    own = [*_LAYOUT_FIELDS, "overwrite"]
    if arguments.direction == "megatron-to-hf":
        own.append("dtype")
    unused = [f"--{name.replace('_', '-')}" for name in own if getattr(arguments, name)]
    if unused:
        remedy = "leave them out: Megatron-Bridge has its own settings"
        raise ConfigError.at(", ".join(unused), "has no effect with --backend bridge", remedy)
    if arguments.direction == "hf-to-megatron":
        dtype = parse_dtype(arguments.dtype) if arguments.dtype else None
        bridge_import(arguments.input, arguments.output, dtype=dtype)
    elif arguments.hf_model is None:
        remedy = "give the Hugging Face directory or hub name of the original model"
        raise ConfigError.at("--hf-model", "is required with --backend bridge", remedy)
    else:
        for directory in directories_of(arguments.input):
            if (directory / FILE).exists():
                # Megatron-Bridge unpickles it without limits, so it is read with limits before.
                read_dcp_metadata(directory)
        bridge_export(arguments.input, arguments.hf_model, arguments.output)
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """Convert; returns the exit code.

    Raises:
        UserError: on every rank.
    """
    if arguments.backend == "bridge":
        return _convert_by_bridge(arguments)
    if arguments.hf_model is not None:
        raise ConfigError.at("--hf-model", "has no effect without --backend bridge", "leave it out")
    # The converter does it again; here it is before imports that take seconds.
    check_target(arguments.output.absolute(), overwrite=arguments.overwrite)
    from megatron_idpo.config.layout import Layout

    if arguments.direction == "hf-to-megatron":
        from megatron_idpo.convert.hf_to_megatron import convert as convert_weights
    else:
        from megatron_idpo.convert.megatron_to_hf import convert as convert_weights
    fields = {name: getattr(arguments, name) for name in _LAYOUT_FIELDS}
    # Stored weights do not depend on it; layouts with experts require it.
    fields["sequence_parallel"] = (arguments.tensor or 1) > 1
    layout = Layout(**{name: value for name, value in fields.items() if value is not None})
    dtype, overwrite = arguments.dtype, arguments.overwrite
    try:
        convert_weights(
            arguments.input, arguments.output, dtype=dtype, layout=layout, overwrite=overwrite
        )
    except ConfigError as error:
        raise _with_other_backend(error) from None
    return 0


def _with_other_backend(error: ConfigError) -> ConfigError:
    """The error; where a family is not supported, the remedy also names the other backend."""
    problems = [
        replace(problem, remedy=f"{problem.remedy}; `--backend bridge` may convert others")
        if problem.location.endswith(": model_type")
        else problem
        for problem in error.problems
    ]
    return ConfigError.of(problems) if problems else error
