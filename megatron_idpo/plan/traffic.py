"""Time of collectives: within a node over its links, between nodes over each GPU's port.

Ranks are numbered as megatron-core numbers them: tensor-parallel ranks are next to each other, then
context-, data- and pipeline-parallel ones. A group is `size` ranks, `stride` apart.

Nothing here was measured: the links' share is what NCCL's tests usually reach.
"""

from megatron_idpo.plan.devices import Device
from megatron_idpo.plan.run_sizes import RunSizes

LINKS = 0.75
"""Of the links' bandwidth, in large messages."""

TENSOR_PASSES = {False: 8, True: 10}
"""Gathers and scatters of a layer's activations around attention and MLP, forward and backward; an
all-reduce is both. Trained weights under sequence parallelism gather their inputs again."""

CONTEXT_PASSES = 3
"""Gathers of a layer's keys and values, forward and backward, and their gradients' scatter
(`mcore.attention.context_parallel`)."""


def collective_s(sent_bytes: float, *, stride: int, size: int, device: Device) -> float:
    """A ring's gather, scatter or reduction, in which each rank sends so many bytes.

    Between nodes each of a group's ranks in a node has a ring through a port, so that a group with
    all 8 ranks of a node sends through 8 ports.
    """
    bandwidth = device.link_bytes_per_s
    if stride * size > device.per_node:
        ranks_of_node = max(device.per_node // stride, 1)
        bandwidth = min(bandwidth, device.network_bytes_per_s * ranks_of_node)
    return sent_bytes / (bandwidth * LINKS)


def all_to_all_s(sent_bytes: float, *, stride: int, size: int, device: Device) -> float:
    """Each rank sends an equal part to every other one; to other nodes through its port."""
    here = min(size, max(device.per_node // stride, 1))
    outside = sent_bytes * (size - here) / max(size - 1, 1)
    inside_s = (sent_bytes - outside) / device.link_bytes_per_s
    return max(inside_s, outside / device.network_bytes_per_s) / LINKS


def tensor_s(
    run: RunSizes, layers: int, recomputed: int, device: Device, *, is_forward: bool
) -> float:
    """Of one row on one stage, within its layers."""
    tensor = run.layout.tensor
    if tensor == 1:
        return 0.0
    hidden = run.positions * run.model.hidden_size * run.width * (tensor - 1) / tensor
    gathers_again = run.lora is None and run.layout.sequence_parallel
    passes = 4 * layers if is_forward else TENSOR_PASSES[gathers_again] * layers + 4 * recomputed
    return collective_s(hidden * passes, stride=1, size=tensor, device=device)


def context_s(run: RunSizes, layers: int, device: Device, *, is_forward: bool) -> float:
    """Of one row on one stage: keys and values of the whole row.

    A recomputed layer gathers as often: it keeps what it gathered the second time.
    """
    context = run.layout.context
    if context == 1:
        return 0.0
    keys_values = 2 * run.row_tokens * run.model.key_width / run.layout.tensor * run.width
    passes = 1 if is_forward else CONTEXT_PASSES
    sent = keys_values * passes * layers * (context - 1) / context
    return collective_s(sent, stride=run.layout.tensor, size=context, device=device)


def expert_s(
    run: RunSizes, layers: int, recomputed: int, device: Device, *, is_forward: bool
) -> float:
    """Of one row on one stage: tokens to their experts and back."""
    expert, expert_tensor = run.layout.expert, run.expert_tensor
    routed = run.sharded_positions * run.model.experts_per_token * run.model.hidden_size * run.width
    passes = 2 * layers if is_forward else 4 * layers + 2 * recomputed
    seconds = 0.0
    if expert > 1:
        sent = routed * (expert - 1) / expert * passes
        seconds += all_to_all_s(sent, stride=expert_tensor, size=expert, device=device)
    if run.model.num_experts and expert_tensor > 1:  # ranks that share an expert gather its tokens
        sent = routed * (expert_tensor - 1) * passes
        seconds += collective_s(sent, stride=1, size=expert_tensor, device=device)
    return seconds


def pipeline_s(run: RunSizes, device: Device, *, is_forward: bool) -> float:
    """Of one row on one stage: an activation to the next, and a gradient back."""
    stages = run.layout.pipeline
    if stages == 1:
        return 0.0
    sent = run.sharded_positions * run.model.hidden_size * run.width
    # Where stages are smaller than a node, those at its end still send to the next node.
    is_inside = run.world_size <= device.per_node
    bandwidth = device.link_bytes_per_s if is_inside else device.network_bytes_per_s
    directions = 1 if is_forward else 2
    return directions * sent * run.layout.virtual_pipeline / (bandwidth * LINKS)


def reduce_gradients_s(
    run: RunSizes, trained: float, trained_experts: float, device: Device
) -> tuple[float, float]:
    """Once per step: to sum float32 gradients, and to gather updated weights.

    Args:
        run: the run.
        trained: dense weights of a rank that are trained.
        trained_experts: those of its experts.
        device: the GPUs.
    """
    layout = run.layout
    expert_stride = run.expert_tensor * layout.expert
    groups = (
        (trained, layout.tensor, run.data * layout.context),
        (
            trained_experts,
            expert_stride,
            max(run.world_size // (expert_stride * layout.pipeline), 1),
        ),
    )
    reduced = gathered = 0.0
    for weights, stride, size in groups:
        share = weights * (size - 1) / size
        times = 1 if run.shards_optimizer else 2  # an all-reduce
        reduced += collective_s(times * share * 4, stride=stride, size=size, device=device)
        if run.shards_optimizer:
            gathered += collective_s(share * run.width, stride=stride, size=size, device=device)
    return reduced, gathered
