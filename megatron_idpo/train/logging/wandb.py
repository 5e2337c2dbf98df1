"""Weights & Biases, as an optional extra: one run there for all starts of a run here.

The run's id is kept beside the metrics, so that a resumed run goes on in the same one. W&B takes
no step twice; so steps are a value of ours, by which everything is plotted.
"""

import importlib
import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_idpo.config.training import WandbConfig
from megatron_idpo.errors import ConfigError, Problem
from megatron_idpo.train.metrics.names import dashboard_name

ID_FILE = "wandb_run_id"


class WandbLogger:
    """A logger to a run in Weights & Biases."""

    def __init__(
        self,
        output: Path,
        settings: WandbConfig,
        *,
        resumed_step: int | None,
        run_config: Mapping[str, Any],
    ) -> None:
        """Begin a run, or go on with the one whose id `output` keeps.

        Args:
            output: the run's directory; W&B's own files go to `wandb` in it.
            settings: project, names and mode.
            resumed_step: the last step this run goes on from; None begins a new run.
            run_config: what W&B is to show as the run's configuration.

        Raises:
            ConfigError: W&B refuses: no account, no connection.
        """
        wandb: Any = importlib.import_module("wandb")  # typed or absent as it may be
        output.mkdir(parents=True, exist_ok=True)
        id_file = output / ID_FILE
        goes_on = resumed_step is not None and id_file.exists()
        run_id = id_file.read_text(encoding="utf-8").strip() if goes_on else secrets.token_hex(4)
        try:
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=settings.name,
                mode=settings.mode,
                id=run_id,
                # Offline there is nobody to ask whether the run exists.
                resume="allow" if goes_on and settings.mode == "online" else None,
                dir=str(output),
                config=dict(run_config),
                # What the console shows is redrawn twice a second: nothing to keep there.
                settings={"console": "off"},
            )
        except Exception as error:  # wandb's own kinds, requests', and its service's
            message = f"cannot be reached: {str(error) or type(error).__name__}"
            remedy = "run `wandb login`, or set logging.wandb.mode to offline"
            raise ConfigError.at("logging.wandb", message, remedy) from error
        id_file.write_text(f"{run_id}\n", encoding="utf-8")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values, with the step they belong to."""
        named = {dashboard_name(name): value for name, value in values.items()}
        self._run.log({"step": step, **named})

    def close(self) -> None:
        """Send what is left and end this start of the run."""
        self._run.finish()


def wandb_problems() -> list[Problem]:
    """Why W&B cannot be logged to here."""
    if importlib.util.find_spec("wandb") is not None:
        return []
    return [
        Problem(
            "logging.wandb",
            "needs the package wandb, which is not installed",
            'pip install "megatron-idpo[wandb]", or leave the section out',
        )
    ]
