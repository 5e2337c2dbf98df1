"""A Megatron-Core checkpoint to Hugging Face weights: `megatron-idpo convert megatron-to-hf`.

The same function as the verb, for those who look for it among the tools.
"""

import sys

from megatron_idpo.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "megatron-to-hf", *sys.argv[1:]]))
