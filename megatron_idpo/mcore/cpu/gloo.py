"""One network thread for all gloo groups of a process.

Megatron-Core creates about twenty groups. In gloo each has a device with a thread that wakes up a
hundred times a second, and two threads that start collectives. With eight ranks on two cores these
threads take a sixth of the machine while they have nothing to do.
"""

from torch.distributed import ProcessGroupGloo, distributed_c10d


def share_gloo_device() -> None:
    """Create the process's gloo groups with one common device from now on.

    Call it before the first group is created, and after a fork: the device has a thread. The
    collectives and their results stay the same. It replaces torch's constructor of the backend
    (`torch.distributed.distributed_c10d._create_gloo_process_group`).
    """
    device = ProcessGroupGloo.create_default_device()

    def create(
        options: distributed_c10d._DistributedBackendOptions, _: object
    ) -> ProcessGroupGloo:  # torch 2.11 has no name for the type of all backends
        own = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # not in torch's stubs
        own._devices = [device]
        # Collectives of a group run one after another on one thread.
        own._threads = 1
        own._timeout = options.timeout
        group = ProcessGroupGloo(options.store, options.group_rank, options.group_size, own)
        group.options.global_ranks_in_group = options.global_ranks_in_group
        group.options.group_name = options.group_id
        return group

    backend = distributed_c10d.Backend
    # Older versions of torch construct gloo groups without this registry: they keep a device each.
    if hasattr(backend, "_ensure_backend_registered"):
        backend._ensure_backend_registered("gloo")
        backend._plugins["GLOO"] = backend._plugins["GLOO"]._replace(creator_fn=create)
