"""A pool whose workers import nothing, and hang: `python light_pool.py PIDS_FILE NUM_WORKERS`.

For tests of what ends together with what, which the seconds of importing torch do not change.
"""

import os
import sys
import time


def write_pid_and_hang(path: str) -> None:
    with open(path, "a") as file:
        file.write(f"{os.getpid()} ")
    time.sleep(1000)


if __name__ == "__main__":
    from megatron_idpo.testing import fork_server, processes, worker

    if sys.argv[1].isdecimal():  # started as the pool's fork server
        worker.prepare = lambda: None
        fork_server.main(int(sys.argv[1]))
    else:
        import light_pool

        from megatron_idpo.testing import WorkerPool

        processes._SERVER = "light_pool"
        with WorkerPool(int(sys.argv[2])) as pool:
            # A program joins no process group, for which it would import torch.
            pool.run_as_program(light_pool.write_pid_and_hang, int(sys.argv[2]), sys.argv[1])
