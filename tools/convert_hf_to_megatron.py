"""Hugging Face weights to a Megatron-Core checkpoint: `megatron-idpo convert hf-to-megatron`.

The same function as the verb, for those who look for it among the tools.
"""

import sys

from megatron_idpo.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "hf-to-megatron", *sys.argv[1:]]))
