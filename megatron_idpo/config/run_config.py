"""`RunConfig`: every section of a configuration file, and contradictions between sections.

Reading a file is `load.py`; the configuration of one sDPO step is `sdpo_steps.py`.
"""

from collections.abc import Iterator

from megatron_idpo.config.data import DataConfig, ModelConfig
from megatron_idpo.config.evaluate import EvaluateConfig, GenerateConfig, H4Config, JudgeConfig
from megatron_idpo.config.export import ExportConfig, hub_name
from megatron_idpo.config.layout import Layout
from megatron_idpo.config.lora import LoraConfig
from megatron_idpo.config.objective import ObjectiveConfig, ReferenceConfig
from megatron_idpo.config.sdpo import SdpoConfig
from megatron_idpo.config.section import Section
from megatron_idpo.config.training import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainingConfig,
)
from megatron_idpo.config.yaml_tree import write_yaml
from megatron_idpo.errors import Problem


class RunConfig(Section):
    """The configuration of a run.

    A required section that the file lacks and the verb does not need is absent: reading it raises
    AttributeError, which means that a verb uses a section that it did not ask for.
    """

    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    lora: LoraConfig | None = None
    layout: Layout = Layout()
    optimizer: OptimizerConfig
    training: TrainingConfig
    reference: ReferenceConfig = ReferenceConfig()
    sdpo: SdpoConfig | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    generate: GenerateConfig = GenerateConfig()
    judge: JudgeConfig | None = None
    h4: H4Config = H4Config()

    def has(self, section: str) -> bool:
        """Whether a section is present, written or by its defaults."""
        return self.__dict__.get(section) is not None

    @property
    def uploads_adapter(self) -> bool:
        """Whether there is a result for PEFT to upload: an adapter on `model.path`."""
        sdpo = self.sdpo
        is_on_model = (
            sdpo is None
            or sdpo.adapters == "carry"
            or sdpo.target == "first"
            or len(sdpo.steps) == 1
        )
        return self.export.push_to_hub is not None and self.lora is not None and is_on_model

    def problems(self) -> Iterator[Problem]:
        """Contradictions between sections; `Problem.location` is `section.field`."""
        if self.has("data"):
            yield from self._row_length_problems()
        if self.has("data") and not self.data.holds_out:
            yield from self._evaluation_problems()
        elif self.has("training") and self.checkpoint.keep_best:
            yield from self._best_checkpoint_problems()
        if self.has("training") and not self.training.export:
            yield from self._export_problems()
        if self.has("model") and self.uploads_adapter and self.export.base_model is None:
            if hub_name(self.model.path) is None:
                message = f"is null, so that others cannot load the adapter: {self.model.path} is"
                message += " a directory of this machine"
                remedy = "set it to the name of the model on the hub"
                yield Problem("export.base_model", message, remedy)
        if self.reference.source == "adapter_off" and not self.has("lora"):
            message, remedy = "is adapter_off, but there are no adapters", "add the section lora"
            yield Problem("reference.source", message, f"use cache, or {remedy}")

    def _export_problems(self) -> Iterator[Problem]:
        """What does not apply because the result of the run is not exported."""
        message, remedy = "has no effect: training.export is false", "set training.export to true"
        if self.sdpo is not None and any(step.export for step in self.sdpo.steps):
            if self.export.push_to_hub is not None:
                message += ", and the models of single steps are not uploaded"
                yield Problem("export.push_to_hub", message, f"leave it out, or {remedy}")
        elif self.export != ExportConfig():
            yield Problem("export", message, f"remove the section, or {remedy}")

    def _row_length_problems(self) -> Iterator[Problem]:
        """Row lengths that context and sequence parallelism cannot split evenly over the ranks."""
        tensor = self.layout.tensor if self.layout.sequence_parallel else 1
        context = self.layout.context
        parts, product = tensor * context, f"layout.tensor = {tensor}"
        remedy = "turn off sequence parallelism"
        if context > 1:
            product, remedy = f"layout.context = {context}", "lower layout.context"
            if tensor > 1:
                product += f" × layout.tensor = {tensor}"
        lengths = {"row_tokens": self.data.row_tokens}
        if self.data.trim_tokens < self.data.row_tokens:  # otherwise rows are not trimmed
            lengths["trim_tokens"] = self.data.trim_tokens
        for name, tokens in lengths.items():
            if tokens % parts:
                message = f"is {tokens}, which does not divide evenly over {product}"
                yield Problem(
                    f"data.{name}", message, f"use {tokens + -tokens % parts}, or {remedy}"
                )

    def _evaluation_problems(self) -> Iterator[Problem]:
        """Fields that need held-out pairs, where there are none."""
        values = {
            "training.eval_every_steps": self.has("training") and self.training.eval_every_steps,
            "checkpoint.keep_best": self.checkpoint.keep_best,
        }
        remedy = "name held-out pairs in data.eval, or set data.eval_fraction"
        for name, value in values.items():
            if value:
                yield Problem(name, f"is {value}, but there are no held-out pairs", remedy)

    def _best_checkpoint_problems(self) -> Iterator[Problem]:
        """`keep_best`, where no step is both evaluated and saved."""
        save, evaluate = self.checkpoint.every_steps, self.training.eval_every_steps
        if save is None:
            message = "checkpoint.every_steps is null: only the last step is saved"
            remedy = f"set checkpoint.every_steps to {evaluate}"
            if evaluate is None:
                remedy = "set it and training.eval_every_steps to 100"
        elif evaluate is None:
            message = "training.eval_every_steps is null: only the last step is evaluated"
            remedy = f"set training.eval_every_steps to {save}"
        elif save % evaluate and evaluate % save:
            message = f"every {save} steps are saved, and every {evaluate} evaluated"
            remedy = f"set checkpoint.every_steps to {save + -save % evaluate}, or "
            remedy += f"training.eval_every_steps to {save}"
        else:
            return
        best = self.checkpoint.keep_best
        yield Problem("checkpoint.keep_best", f"is {best}, but {message}", remedy)

    def dump(self) -> str:
        """The resolved configuration as YAML; `load_config` reads the same value from it.

        Sections that only evaluation reads are left out where they have their defaults.
        """
        fields = type(self).model_fields
        unset = {name for name in EVALUATION if getattr(self, name) == fields[name].default}
        sections = self.model_dump(mode="json", exclude=unset)
        return write_yaml({name: value for name, value in sections.items() if value is not None})


SECTIONS = tuple(RunConfig.model_fields)
EVALUATION = ("evaluate", "generate", "judge", "h4")
"""The sections that training does not read."""
