"""The verb `plan`: memory and time of a run before it is started."""

import argparse
import logging

from megatron_idpo.cli.arguments import add_choice, add_config_arguments, config_path

DEVICES = ("h100", "h200", "b200", "a100", "cpu")


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_config_arguments(parser, required=True)
    meaning = "GPUs of the run (default: as many as one replica of the model needs)"
    parser.add_argument("--gpus", type=int, metavar="N", help=meaning)
    meaning = "the kind of GPU (default: h100); cpu is this machine"
    add_choice(parser, "--device", DEVICES, default="h100", help=meaning)
    parser.add_argument("--json", action="store_true", help="print JSON")
    meaning = "rank the layouts that fit, instead of planning the configuration's"
    parser.add_argument("--search", action="store_true", help=meaning)
    meaning = "positions of a pair, its prompt counted once (`megatron-idpo data` shows the mean)"
    parser.add_argument("--pair-tokens", type=int, metavar="N", help=meaning)
    parser.add_argument("--pairs", type=int, metavar="N", help="training pairs of the data set")
    meaning = "share of the memory that advice and --search leave free (default: 0.06)"
    parser.add_argument("--headroom", type=float, metavar="SHARE", help=meaning)


def plan(arguments: argparse.Namespace) -> int:
    """Print the plan; returns the exit code.

    Raises:
        ConfigError: it cannot be made, or the run does not fit.
    """
    from megatron_idpo.plan.main import main
    from megatron_idpo.plan.run_sizes import Assumptions

    path = config_path(arguments)
    assert path is not None
    if arguments.json:  # `lora=null` is confirmed by a message, which would precede the JSON
        logging.getLogger("megatron_idpo").setLevel(logging.WARNING)
    given = {"pair_tokens": arguments.pair_tokens, "pairs": arguments.pairs}
    assumed = Assumptions(**{name: value for name, value in given.items() if value is not None})
    return main(
        path,
        arguments.overrides,
        gpus=arguments.gpus,
        device_name=arguments.device,
        as_json=arguments.json,
        searches=arguments.search,
        headroom=arguments.headroom,
        assumed=assumed,
    )
