"""The verb `convert`: its arguments and the choice of the converter."""

import argparse
from pathlib import Path

from megatron_idpo.cli.arguments import one_of
from megatron_idpo.errors import ConfigError

_DIRECTIONS = ("hf-to-megatron", "megatron-to-hf")
FORMATS = ("fp32", "bf16", "fp16")
_BACKENDS = ("own", "bridge")
_OWN_OPTIONS = {
    "tensor": 1,
    "pipeline": 1,
    "virtual_pipeline": 1,
    "pipeline_layers": None,
    "overwrite": False,
}
"""Options of our own converter with their defaults."""


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "direction",
        type=one_of("direction", _DIRECTIONS),
        metavar="|".join(_DIRECTIONS),
        help="the direction",
    )
    parser.add_argument("input", type=Path, metavar="INPUT", help="the checkpoint's directory")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the directory to write")
    parser.add_argument(
        "--dtype",
        type=one_of("dtype", FORMATS),
        metavar="|".join(FORMATS),
        help="the dtype of the weights (default: as stored)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    split = parser.add_argument_group(
        "under torchrun", "how to split the work; the result does not depend on it"
    )
    for name, meaning in (
        ("tensor", "ranks that share every weight matrix"),
        ("pipeline", "pipeline stages"),
        ("virtual-pipeline", "model chunks per stage"),
    ):
        split.add_argument(f"--{name}", type=int, default=1, metavar="N", help=meaning)
    split.add_argument(
        "--pipeline-layers",
        type=_counts,
        metavar="N,N,...",
        help="layers of each virtual stage, if they do not divide evenly",
    )
    other = parser.add_argument_group("model families without support in this package")
    other.add_argument(
        "--backend",
        type=one_of("backend", _BACKENDS),
        default="own",
        metavar="|".join(_BACKENDS),
        help="bridge uses Megatron-Bridge (needs Transformer Engine and a GPU)",
    )
    other.add_argument(
        "--hf-model",
        type=Path,
        metavar="DIR",
        help="with --backend bridge, megatron-to-hf: the original model of the checkpoint",
    )


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"cannot parse {text!r}; expected a list such as 3,2"
        ) from None


def _convert_by_bridge(arguments: argparse.Namespace) -> int:
    from megatron_idpo.checkpoint.dtypes import parse_dtype
    from megatron_idpo.mcore.model.bridge import bridge_export, bridge_import

    unused = [
        f"--{name.replace('_', '-')}"
        for name, unset in _OWN_OPTIONS.items()
        if getattr(arguments, name) != unset
    ]
    if arguments.direction == "megatron-to-hf" and arguments.dtype:
        unused.append("--dtype")
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
    from megatron_idpo.config.layout import Layout

    if arguments.direction == "hf-to-megatron":
        from megatron_idpo.convert.hf_to_megatron import convert as convert_weights
    else:
        from megatron_idpo.convert.megatron_to_hf import convert as convert_weights
    layout = Layout(
        tensor=arguments.tensor,
        pipeline=arguments.pipeline,
        virtual_pipeline=arguments.virtual_pipeline,
        pipeline_layers=arguments.pipeline_layers,
    )
    convert_weights(
        arguments.input,
        arguments.output,
        dtype=arguments.dtype,
        layout=layout,
        overwrite=arguments.overwrite,
    )
    return 0
