"""Hugging Face weights to a Megatron-Core checkpoint: `megatron-idpo convert hf-to-megatron`.

Same as the verb, for users who look for a script in `tools/`.
"""

import sys

from megatron_idpo.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "hf-to-megatron", *sys.argv[1:]]))
