"""LoRA on Transformer Engine's layers (a stand-in); a rank, in its own process.

transformer_engine_run.py RANK WORLD_SIZE RENDEZVOUS_FILE BASE ADAPTER CASE RESULT
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from megatron_idpo.mcore.cpu.redirect import redirect_cuda_to_cpu
from tests.mcore.transformer_engine_run import engine


def main(rank: int, world_size: int, rendezvous: str, base: str, adapter: str, *files: str) -> None:
    """Train, and save what `train` returns."""
    redirect_cuda_to_cpu()
    from tests.lora.lora_run import train

    case, result = files
    store = torch.distributed.FileStore(rendezvous, world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    with engine(True):
        trained = train(base, adapter, torch.load(case, weights_only=False))
    torch.save(trained, f"{result}.{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _, own_rank, ranks, *paths = sys.argv
    main(int(own_rank), int(ranks), *paths)
