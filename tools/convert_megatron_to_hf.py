"""A Megatron-Core checkpoint to Hugging Face weights: `megatron-idpo convert megatron-to-hf`.

Same as the verb, for users who look for a script in `tools/`.
"""

import sys

from megatron_idpo.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "megatron-to-hf", *sys.argv[1:]]))
