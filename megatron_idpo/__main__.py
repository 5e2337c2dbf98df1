"""`python -m megatron_idpo VERB ...`; torchrun starts a verb on every rank this way."""

import sys

from megatron_idpo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
