"""Intermediate DPO in a plain megatron-core loop: a stock GPTModel, padded batches.

    torchrun --nproc-per-node 2 examples/plugin/megatron_core_loop.py

One pipeline stage per process, on GPUs or CPUs. The lines that end with `#` are the plugin's;
everything else would be in the script without it.
"""

from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from megatron_idpo import Objective, PreferenceBatch, Targets, attach  #
from megatron_idpo.mcore.cpu.redirect import backend, redirect_cuda_to_cpu

VOCAB, LENGTH, PAIRS, STEPS = 64, 24, 4, 3
PROMPT, ANSWER = 8, 12


def random_batches():
    """Two micro-batches of two pairs each; yours come from a tokenizer. The same on every rank.

    Prompts and answers have different lengths; rows are padded at the end.
    """
    generator = torch.Generator().manual_seed(0)
    for index in range(2):
        tokens = torch.randint(VOCAB, (4, LENGTH), generator=generator)
        tokens[1::2, :PROMPT] = tokens[0::2, :PROMPT]  # chosen, rejected, chosen, rejected
        answers = [ANSWER, ANSWER - 3, ANSWER - 1 - index, ANSWER]
        response_mask = torch.zeros(4, LENGTH, dtype=torch.bool)
        for row, answer in enumerate(answers):
            response_mask[row, PROMPT : PROMPT + answer] = True
        yield tokens, Targets.from_mask(tokens, response_mask)  #


def build():
    """One stage of a GPTModel."""
    config = TransformerConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=torch.distributed.get_world_size(),
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def run(dpo, model, reference, forward_only):
    """One global batch through the schedule; `reference[layer]` has `[2P]` per micro-batch."""
    device = next(model.parameters()).device
    position_ids = torch.arange(LENGTH, device=device).expand(4, LENGTH)
    hides = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=device).triu(1)[None, None]

    def batches():
        for index, (tokens, targets) in enumerate(random_batches()):
            yield (
                tokens.to(device),
                PreferenceBatch(  #
                    targets,  #
                    reference_logps={at: logps[index] for at, logps in reference.items()},  #
                    index=index,  #
                    num_micro_batches=2,  #
                    global_pairs=PAIRS,  #
                ).to(device),
            )

    def forward_step(iterator, model):
        tokens, batch = next(iterator)
        output = model(tokens, position_ids, hides, **dpo.model_kwargs(batch))  #
        return output, partial(dpo.loss, batch)  #

    with torch.set_grad_enabled(not forward_only):
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches(),
            model=[model],
            num_microbatches=2,
            seq_length=LENGTH,
            micro_batch_size=4,
            forward_only=forward_only,
        )


def main():
    """Score the reference, then train."""
    redirect_cuda_to_cpu()  # does nothing where there is a GPU
    torch.distributed.init_process_group(backend())
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=torch.distributed.get_world_size()
    )
    model_parallel_cuda_manual_seed(1)
    chunk = build()
    dpo = attach([chunk], layers=[0.5], objective=Objective(), vocab_size=VOCAB)  #
    model = DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3), [model])
    chunk.config.finalize_model_grads_func = dpo.finalize_model_grads  #

    with dpo.collect_outputs() as outputs:  #
        run(dpo, model, reference={}, forward_only=True)
    reference = {}
    for output in outputs:  # this stage's layers, in the order of the micro-batches
        reference.setdefault(output.layer, []).append(output.logps_2P)
    for step in range(STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        log = run(dpo, model, reference, forward_only=False)
        optimizer.step()
        if log:  # on the last stage
            sums = {name: sum(part[name] for part in log) for name in log[0]}
            values = {name: float(total / pairs) for name, (total, pairs) in sums.items()}
            for name in ("loss", "final loss", "layer 2 loss", "rewards/margins"):
                print(f"step {step} {name} {values[name]:.6f}", flush=True)
    dpo.detach()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
