"""`python -m megatron_idpo.testing.phantom_gpu VERB ...`: the command line on the phantom GPU."""

import runpy

from megatron_idpo.mcore.megatron_warnings import suppress_megatron_warnings


def main() -> None:
    """Run the package as a program, with its own arguments and exit code."""
    with suppress_megatron_warnings():
        from megatron_idpo.testing.phantom_gpu.device import phantom

    with phantom():
        runpy.run_module("megatron_idpo", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
