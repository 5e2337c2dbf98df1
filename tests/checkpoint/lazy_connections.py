"""Prints how many sockets the background saver's group opens; forks RANKS processes.

lazy_connections.py RANKS RENDEZVOUS_FILE
"""

import os
import sys

import torch.distributed as dist


def num_sockets() -> int:
    """Of this process."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # that of the listing
            continue
    return sum(link.startswith("socket:") for link in links)


def main(rank: int, ranks: int, rendezvous: str) -> None:
    """Open the group and exchange what a save exchanges."""
    from megatron_idpo.checkpoint.background_save import BackgroundWorker

    dist.init_process_group(
        "gloo", store=dist.FileStore(rendezvous, ranks), rank=rank, world_size=ranks
    )
    before = num_sockets()
    group = BackgroundWorker().group
    gathered = [None] * ranks if rank == 0 else None
    dist.gather_object(rank, gathered, dst=0, group=group)
    scattered = [None]
    dist.scatter_object_list(scattered, gathered, src=0, group=group)
    assert scattered == [rank]
    # One system call, also without buffering: the lines of processes must not mix.
    os.write(1, f"{num_sockets() - before}\n".encode())
    dist.barrier()


if __name__ == "__main__":
    num_ranks = int(sys.argv[1])

    children = []
    for own_rank in range(num_ranks):
        child = os.fork()
        if child == 0:
            main(own_rank, num_ranks, sys.argv[2])
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(codes))
