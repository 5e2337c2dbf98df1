"""Low-rank adapters for the experts of a layer, computed for all of a rank's experts together.

As in PEFT's `target_parameters`, an expert has one adapter for the gate and the up projection,
which share A, and one for the down projection. The products are grouped like the experts' own
(`mcore/model/grouped_experts.py`), so that an expert computes its tokens only.

The dispatcher gives expert-tensor-parallel ranks the same tokens, and sums their outputs and the
gradients of their inputs. Hence the low-rank activation needs no exchange:

    gate_up_proj: A is replicated, B is sharded like the rows of gate and of up.
    down_proj: A is sharded like the columns, B is replicated; each rank adds the part of the output
        that comes from its columns.

Each rank's gradient of a replicated tensor is a partial sum, which is all-reduced over the expert-
tensor-parallel group.

    N  tokens of this rank's experts, sorted by expert   E  experts of this rank   r  rank
    I  input features   O  output features   H  hidden size   F  features of an expert on this rank
"""

from collections.abc import Iterator, Sequence

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor
from torch.nn.functional import grouped_mm, pad

from megatron_idpo.mcore.lora.linear import LoraHyperparams
from megatron_idpo.mcore.model.grouped_experts import GroupedExperts

EXPERT_LINEARS = {"linear_fc1": "gate_up_proj", "linear_fc2": "down_proj"}
"""megatron-core's linears of an expert, and PEFT's names of their weights."""

_ALIGNED_BYTES = 16
"""`grouped_mm` requires rows whose size is a multiple of this."""


class ExpertAdapters(torch.nn.Module):
    """A and B of all experts of this rank, stacked."""

    def __init__(
        self, layer: MoELayer, targets: Sequence[str], hyperparams: LoraHyperparams
    ) -> None:
        """Allocate A (uninitialized) and B (zeros) for each target.

        Args:
            layer: with `GroupedExperts`; it does not become a submodule.
            targets: names in `EXPERT_LINEARS`.
            hyperparams: rank and scale; PEFT has no dropout for experts.
        """
        super().__init__()
        assert not hyperparams.dropout
        self.targets = tuple(name for name in EXPERT_LINEARS.values() if name in targets)
        self.hyperparams = hyperparams
        self.first_expert: int = layer.local_expert_indices[0]
        """This rank's first expert, counted over the whole model."""
        # In a list, so that the frozen weights are not parameters of this module.
        self._experts: list[GroupedExperts] = [layer.experts]
        self._tensor_group: torch.distributed.ProcessGroup = self.experts.tp_group
        for name in self.targets:
            self._allocate(name, self.weights(name)[0])

    @property
    def experts(self) -> GroupedExperts:
        """The adapted experts."""
        return self._experts[0]

    def weights(self, target: str) -> list[torch.nn.Parameter]:
        """The weights `[O, I]` of this rank's experts that a target adapts."""
        (linear,) = (name for name, adapted in EXPERT_LINEARS.items() if adapted == target)
        return [getattr(expert, linear).weight for expert in self.experts.local_experts]

    def down(self, target: str) -> torch.nn.Parameter:
        """A of a target, `[E, r, I]`."""
        parameter = getattr(self, f"{target}_A")
        assert isinstance(parameter, torch.nn.Parameter)
        return parameter

    def up(self, target: str) -> torch.nn.Parameter:
        """B of a target: `[E, 2, F, r]` for gate and up, `[E, H, r]` for down."""
        parameter = getattr(self, f"{target}_B")
        assert isinstance(parameter, torch.nn.Parameter)
        return parameter

    def split_dim(self, target: str, side: str) -> int | None:
        """The dimension of A or B that is sharded over expert-tensor-parallel ranks, if any."""
        return {("gate_up_proj", "B"): 2, ("down_proj", "A"): 2}.get((target, side))

    def forward(self, linear: str, tokens_NI: Tensor, ends_E: Tensor, output_NO: Tensor) -> Tensor:
        """Add the adapters' contribution to the output of a linear of all experts, in place.

        Collective in the backward pass: an all-reduce of the gradient of a replicated tensor over
        the expert-tensor-parallel group.

        Args:
            linear: a key of `EXPERT_LINEARS`.
            tokens_NI: the linears' input.
            ends_E: int32, the end of each expert's tokens.
            output_NO: the linears' output, not used by anything else yet.
        """
        target = EXPERT_LINEARS[linear]
        if target not in self.targets:
            return output_NO
        down_ErI, up_EOr = self._shared(target, "A"), self._shared(target, "B")
        if up_EOr.dim() > 3:
            up_EOr = up_EOr.flatten(1, 2)
        # Zeros in further low-rank features change nothing.
        missing = -down_ErI.shape[1] % (_ALIGNED_BYTES // down_ErI.element_size())
        if missing:
            down_ErI, up_EOr = pad(down_ErI, (0, 0, 0, missing)), pad(up_EOr, (0, missing))
        low_Nr = grouped_mm(tokens_NI, down_ErI.transpose(1, 2), offs=ends_E)
        # Scaled here, where there are few features.
        scaled_Nr = low_Nr * self.hyperparams.scaling
        return output_NO.add_(grouped_mm(scaled_Nr, up_EOr.transpose(1, 2), offs=ends_E))

    def merged_weight(self, target: str, expert: int) -> Tensor:
        """This rank's shard of an expert's weight with the adapter merged, in fp32.

        Args:
            target: one of `targets`.
            expert: index among this rank's experts.
        """
        weight_OI = self.weights(target)[expert].detach()
        up_Or = self.up(target)[expert].detach().float().view(len(weight_OI), -1)
        down_rI = self.down(target)[expert].detach().float()
        return torch.addmm(weight_OI.float(), up_Or, down_rI, alpha=self.hyperparams.scaling)

    def merged_weights(self) -> Iterator[tuple[torch.nn.Parameter, str, int]]:
        """Each adapted weight, with the arguments of `merged_weight`."""
        for target in self.targets:
            for expert, weight in enumerate(self.weights(target)):
                yield weight, target, expert

    def _allocate(self, target: str, weight_OI: Tensor) -> None:
        num_experts, rank = len(self.experts.local_experts), self.hyperparams.rank
        outputs, inputs = weight_OI.shape
        rows: tuple[int, ...] = (outputs,)
        if target == "gate_up_proj":
            rows, rank = (2, outputs // 2), self.hyperparams.gate_up_rank or rank
        tensors = {
            "A": weight_OI.new_empty(num_experts, rank, inputs),
            "B": weight_OI.new_zeros(num_experts, *rows, rank),
        }
        for side, tensor in tensors.items():
            parameter = torch.nn.Parameter(tensor)
            # The gradient norm counts sharded parameters on every rank and replicated ones once.
            if (dim := self.split_dim(target, side)) is not None:
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
            # As megatron-core marks experts: DDP reduces them over the ranks with the same experts.
            setattr(parameter, "allreduce", False)  # noqa: B010 - not a Tensor field
            self.register_parameter(f"{target}_{side}", parameter)

    def _shared(self, target: str, side: str) -> Tensor:
        """A or B; the gradient of a replicated one is summed over expert-tensor-parallel ranks."""
        parameter = self.down(target) if side == "A" else self.up(target)
        if self.split_dim(target, side) is not None or self._tensor_group.size() == 1:
            return parameter
        shared: Tensor = copy_to_tensor_model_parallel_region(parameter, group=self._tensor_group)
        return shared
