"""What is told of models that complete steps have not left."""

from pathlib import Path

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.sdpo import SdpoConfig, SdpoStepConfig
from megatron_idpo.config.training import TrainingConfig
from megatron_idpo.sdpo.missing_exports import missing_exports

from .tiny_manifest import manifest


def config(root: Path, *step_exports: bool, export: bool = True) -> RunConfig:
    training = TrainingConfig(output=str(root), export=export)
    steps = tuple(SdpoStepConfig(export=wanted) for wanted in step_exports)
    return RunConfig.model_construct(training=training, sdpo=SdpoConfig(steps=steps))


def test_every_model_that_is_wanted_and_not_there(tmp_path: Path) -> None:
    now = manifest("complete", "complete")
    snapshots = tmp_path / "snapshots"
    assert missing_exports(config(tmp_path, True, False), tmp_path, now) == [
        f"there is no {hf}; to make it: megatron-idpo convert megatron-to-hf {snapshot} {hf}"
        for snapshot, hf in (
            (snapshots / "step-1", tmp_path / "step-1" / "hf"),
            (snapshots / "step-2", tmp_path / "hf"),
        )
    ]
    (tmp_path / "step-1" / "hf").mkdir(parents=True)
    (tmp_path / "hf").mkdir()
    assert missing_exports(config(tmp_path, True, False), tmp_path, now) == []


def test_what_is_not_wanted_or_not_complete_is_not_reported(tmp_path: Path) -> None:
    every = config(tmp_path, True, True)
    assert missing_exports(every, tmp_path, manifest("training", "pending")) == []
    [message] = missing_exports(every, tmp_path, manifest("complete", "training"))
    assert "step-1/hf; to make it" in message
    none = config(tmp_path, False, False, export=False)
    assert missing_exports(none, tmp_path, manifest("complete", "complete")) == []


def test_what_cannot_be_made_of_a_snapshot(tmp_path: Path) -> None:
    wanted = config(tmp_path, False)
    carried = manifest("complete", adapters="carry")
    message = (
        f"there is no {tmp_path / 'hf'}; the adapter for PEFT is in {tmp_path}/snapshots/step-1"
    )
    assert missing_exports(wanted, tmp_path, carried) == [message]
    [message] = missing_exports(wanted, tmp_path, carried.with_step(1, is_removed=True))
    assert message.endswith("snapshots/step-1, of which it could be made, has been removed")
