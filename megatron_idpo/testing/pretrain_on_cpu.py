"""Runs a script that calls Megatron-LM's `pretrain()` on CPUs, without a change to the script.

    torchrun --nproc-per-node 2 -m megatron_idpo.testing.pretrain_on_cpu script.py ARGUMENTS

Among the arguments: `--distributed-backend gloo --transformer-impl local`.
"""

import runpy
import sys


def main() -> None:
    """Run the script named by the first argument; the others are its own."""
    if len(sys.argv) < 2:
        sys.exit(f"usage: torchrun -m {__spec__.name} SCRIPT [ARGUMENT ...]")
    from megatron_idpo.mcore.cpu.pretrain import redirect_pretrain_to_cpu

    redirect_pretrain_to_cpu()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
