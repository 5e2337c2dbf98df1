"""Stock Megatron-Core training on redirected CPUs, compared with a single rank.

A tiny GPT is trained for two steps with each schedule, recomputation and parallel layout; the full
weights must equal those of a single process without any of these.
"""

import pytest
import torch

pytestmark = pytest.mark.distributed

LAYERS, HIDDEN, VOCABULARY, SEQUENCE, MICROBATCHES, EXPERTS = 4, 16, 32, 8, 4, 4
LEARNING_RATE = 1e-2

WEIGHT_ATOL = 1e-3 * LEARNING_RATE
"""fp32 sums in another order. Adam's step is about one learning rate; its eps of 1e-3 prevents
near-zero gradients from amplifying the difference."""

BF16_WEIGHT_ATOL = 2 * LEARNING_RATE
"""Two steps' updates: a weight without an update, or with a wrong one, is further away."""


def norm_for_sequence_parallelism(config, hidden_size, eps=1e-5, **_):
    norm = torch.nn.RMSNorm(hidden_size, eps=eps)
    norm.weight.sequence_parallel = config.sequence_parallel
    return norm


def start(*, tensor=1, pipeline=1, chunks=None, expert=1):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor, pipeline, chunks, expert_model_parallel_size=expert
    )
    model_parallel_cuda_manual_seed(123)


def build(*, tensor=1, pipeline=1, chunks=None, expert=1, **options):
    """This rank's model chunks; each weight depends on its global name only."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=chunks,
        expert_model_parallel_size=expert,
        pipeline_dtype=torch.float32,
        batch_p2p_comm=False,
        deallocate_pipeline_outputs=True,
        normalization="RMSNorm",
        add_bias_linear=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **options,
    )
    layer = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization="RMSNorm")
    layer.submodules.input_layernorm = norm_for_sequence_parallelism
    layer.submodules.pre_mlp_layernorm = norm_for_sequence_parallelism
    models = []
    for stage in range(chunks or 1):
        vp_stage = stage if chunks else None
        stage_arguments = {"ignore_virtual": False, "vp_stage": vp_stage}
        model = GPTModel(
            config,
            TransformerBlockSubmodules(
                layer_specs=[layer] * (LAYERS // pipeline // (chunks or 1)),
                layer_norm=norm_for_sequence_parallelism,
            ),
            VOCABULARY,
            SEQUENCE,
            pre_process=parallel_state.is_pipeline_first_stage(**stage_arguments),
            post_process=parallel_state.is_pipeline_last_stage(**stage_arguments),
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        initialize(model)
        models.append(model)
    return models


def global_names(model):
    """Parameters with the names that they have in a model on one rank."""
    from megatron.core import parallel_state

    while hasattr(model, "module"):
        model = model.module
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if "layers" in parts:
            at = parts.index("layers") + 1
            parts[at] = str(model.decoder.layers[int(parts[at])].layer_number - 1)
        if "local_experts" in parts:
            at = parts.index("local_experts") + 1
            local_experts = EXPERTS // parallel_state.get_expert_model_parallel_world_size()
            first = parallel_state.get_expert_model_parallel_rank() * local_experts
            parts[at] = str(first + int(parts[at]))
        yield ".".join(parts), parameter


def split_axis(parameter):
    """The axis sharded over tensor-parallel ranks, or None."""
    if getattr(parameter, "tensor_model_parallel", False):
        return parameter.partition_dim
    return None


def initialize(model):
    from megatron.core import parallel_state

    world = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in global_names(model):
        generator = torch.Generator().manual_seed(sum(name.encode()) * len(name))
        shape, axis = list(parameter.shape), split_axis(parameter)
        if axis is not None:
            shape[axis] *= world
        full = 0.2 * torch.randn(shape, generator=generator) + (len(shape) == 1)
        with torch.no_grad():
            parameter.copy_(full if axis is None else full.chunk(world, axis)[rank])


def full_weights(models):
    """All weights of all stages, unsharded, on every rank."""
    from megatron.core import parallel_state

    world = parallel_state.get_tensor_model_parallel_world_size()
    group = parallel_state.get_tensor_model_parallel_group()
    own_stage = {}
    for model in models:
        for name, parameter in global_names(model):
            parts = [torch.empty_like(parameter) for _ in range(world)]
            torch.distributed.all_gather(parts, parameter.detach().contiguous(), group=group)
            axis = split_axis(parameter)
            own_stage[name] = parts[0] if axis is None else torch.cat(parts, axis)
    all_stages = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(all_stages, own_stage)
    return {name: weight for stage in all_stages for name, weight in stage.items()}


def microbatches():
    """This rank's share of the global batch, one sequence at a time."""
    from megatron.core import parallel_state

    world = parallel_state.get_data_parallel_world_size()
    rank = parallel_state.get_data_parallel_rank()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (MICROBATCHES, 1, SEQUENCE + 1), generator=generator)
    while True:
        yield from tokens.chunk(world)[rank]


def forward_step(iterator, model):
    tokens = next(iterator)
    positions = torch.arange(SEQUENCE, device="cuda")[None]
    output = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])

    def loss(losses):
        return losses.mean(), {"loss": losses.mean().detach()}

    return output, loss


def train(layout, options=None, ddp=None, steps=2):
    """Two steps of DDP and Adam; the full weights and this rank's losses."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.module import Float16Module

    start(**layout)
    ddp_config = DistributedDataParallelConfig(**(ddp or {}))
    models = build(**layout, **(options or {}))
    config = models[0].config
    if config.bf16:
        models = [Float16Module(config, model) for model in models]
    models = [
        DistributedDataParallel(config, ddp_config, model, disable_bucketing=index > 0)
        for index, model in enumerate(models)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = [model.no_sync for model in models]
        config.no_sync_func = config.no_sync_func[0] if len(models) == 1 else config.no_sync_func
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=LEARNING_RATE,
            adam_eps=1e-3,
            weight_decay=0.0,
            bf16=config.bf16,
            use_distributed_optimizer=ddp_config.use_distributed_optimizer,
            overlap_param_gather=ddp_config.overlap_param_gather,
        ),
        models,
    )
    data = [microbatches() for _ in models]
    losses = []
    for _ in range(steps):
        for model in models:
            model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data if len(models) > 1 else data[0],
            model=models if len(models) > 1 else models[0],
            num_microbatches=MICROBATCHES // parallel_state.get_data_parallel_world_size(),
            seq_length=SEQUENCE,
            micro_batch_size=1,
            forward_only=False,
        )
        updated, _, _ = optimizer.step()
        assert updated
        losses += [report["loss"].item() for report in reports]
    if ddp_config.overlap_param_gather:
        for model in models:
            model.start_param_sync(force_sync=True)
    return full_weights(models), losses


def worst_difference(weights, expected):
    assert weights.keys() == expected.keys()
    return max((weights[name] - expected[name]).abs().max().item() for name in expected)


@pytest.fixture(scope="module")
def single_rank(workers):
    ((weights, losses),) = workers.run(train, 1, {})
    assert sum(losses[MICROBATCHES:]) < sum(losses[:MICROBATCHES]), "training must reduce the loss"
    return weights


OVERLAP = {"overlap_grad_reduce": True}
SHARDED = {**OVERLAP, "use_distributed_optimizer": True, "overlap_param_gather": True}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
CASES = {
    "ddp": (2, {}, {}, {}),
    "ddp-overlap": (2, {}, {}, OVERLAP),
    "distributed-optimizer": (2, {}, {}, SHARDED),
    "tensor": (2, {"tensor": 2}, {}, {}),
    "sequence": (2, {"tensor": 2}, {"sequence_parallel": True}, SHARDED),
    "1f1b": (2, {"pipeline": 2}, {}, {}),
    "interleaved": (2, {"pipeline": 2, "chunks": 2}, {}, OVERLAP),
    "recompute-block": (1, {}, {**FULL, "recompute_method": "block"}, {}),
    "recompute-uniform": (2, {"pipeline": 2}, {**FULL, "recompute_method": "uniform"}, {}),
    "recompute-selective": (
        2,
        {"tensor": 2},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
        {},
    ),
    "everything": (
        4,
        {"tensor": 2, "pipeline": 2},
        {**FULL, "recompute_method": "uniform", "sequence_parallel": True},
        SHARDED,
    ),
}


SELECTED = ("sequence", "interleaved", "recompute-block", "everything")
"""Together they have every feature except what `tests/plugin` trains with our own code."""


@pytest.mark.parametrize(
    "case",
    [
        case if case in SELECTED else pytest.param(case, marks=pytest.mark.exhaustive)
        for case in CASES
    ],
)
def test_a_layout_trains_like_a_single_rank(workers, single_rank, case):
    world_size, layout, options, ddp = CASES[case]
    for weights, _ in workers.run(train, world_size, layout, options, ddp):
        assert worst_difference(weights, single_rank) < WEIGHT_ATOL


MOE = {
    "num_moe_experts": EXPERTS,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "moe_ffn_hidden_size": 24,
}


@pytest.fixture(scope="module")
def single_rank_moe(workers):
    options = MOE | {"moe_token_dispatcher_type": "allgather"}
    ((weights, _),) = workers.run(train, 1, {}, options)
    return weights


@pytest.mark.parametrize(
    "dispatcher", [pytest.param("allgather", marks=pytest.mark.exhaustive), "alltoall"]
)
def test_experts_train_like_on_a_single_rank(workers, single_rank_moe, dispatcher):
    options = MOE | {"moe_token_dispatcher_type": dispatcher}
    for weights, _ in workers.run(train, 2, {"expert": 2}, options):
        assert worst_difference(weights, single_rank_moe) < WEIGHT_ATOL


def test_bf16_trains_with_fp32_main_parameters(workers, single_rank):
    options = {"bf16": True, "params_dtype": torch.bfloat16}
    for ddp in ({}, SHARDED):
        for weights, _ in workers.run(train, 2, {}, options, {**ddp, "grad_reduce_in_fp32": True}):
            assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
            weights = {name: weight.float() for name, weight in weights.items()}
            assert worst_difference(weights, single_rank) < BF16_WEIGHT_ATOL
