"""`python -m megatron_idpo VERB ...`, which is also how torchrun starts a verb on every rank."""

import sys

from megatron_idpo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
