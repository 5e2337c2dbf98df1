"""Measures layouts on a phantom GPU without arithmetic: `python measured_layouts.py CASES.jsonl`.

Prints a line of JSON for each. One process measures many: importing torch takes longest.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.mcore.megatron_warnings import suppress_megatron_warnings


def main() -> None:
    with suppress_megatron_warnings():
        from megatron_idpo.testing.phantom_gpu.training_step import measure_step

        for line in Path(sys.argv[1]).read_text().splitlines():
            case = json.loads(line)
            measured = measure_step(
                RunConfig.model_validate(case["config"]),
                case["model"],
                rank=case["rank"],
                world_size=case["world_size"],
                rows=case["rows"],
            )
            print("MEASURED " + json.dumps(asdict(measured)), flush=True)


if __name__ == "__main__":
    main()
