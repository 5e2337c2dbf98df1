"""`ScaledModel`: a `GPTModel` with a factor on its embedding and a map of its logits."""

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_idpo.mcore.model.logit_map import LogitMap


class ScaledModel(GPTModel):
    """megatron-core's model; `logit_map` is read by the heads of taps too (`plugin/head.py`)."""

    def __init__(
        self, *args: Any, logit_map: LogitMap, embedding_factor: float, **kwargs: Any
    ) -> None:
        """Build megatron-core's model.

        Args:
            *args: of `GPTModel`.
            logit_map: of the output layer's product.
            embedding_factor: of the embedding's output.
            **kwargs: of `GPTModel`.
        """
        super().__init__(*args, **kwargs)
        self.logit_map = logit_map
        if self.pre_process and embedding_factor != 1.0:
            self.embedding.register_forward_hook(partial(_scale_output, embedding_factor))

    def _scale_logits(self, logits: Tensor) -> Tensor:
        return self.logit_map(logits)


def _scale_output(factor: float, module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * factor
