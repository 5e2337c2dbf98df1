"""What the layers said in a step: log-probabilities and losses, on the stage they live on."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerOutput:
    """One layer's reading of one micro-batch."""

    layer: int
    """Counted from 1; the model's number of layers is the final one."""

    micro_batch: int
    """`MicroBatch.index`."""

    logps_2P: Tensor
    """Sequence log-probabilities of the policy, float32, detached."""

    reference_logps_2P: Tensor | None
    """The reference's, where the micro-batch brought them."""

    loss_P: Tensor | None
    """The layer's own loss of each pair (Eq. 1), unweighted, detached; None without a reference."""
