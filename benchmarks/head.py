"""Cost of the vocabulary head beyond its matrix products: memory and time.

    python benchmarks/head.py [--device cpu|cuda] [--threads 1] [--save]

*Memory*: peak bytes of forward and backward beyond hidden states, weight, targets, their gradients
and the frozen path's gradient `u` (counted in the weight's dtype; that it is float32 is part of the
extra). Every allocated tensor is tracked until it is freed. The tensors have shapes but no values
(fake tensors for the CPU path, meta tensors for the GPU path), so sizes are real and no GPU is
needed. Allocations inside kernels are not counted: `--resident 1024x4096x151936` runs that size and
reads the peak of the process's resident memory, or of the CUDA allocator.

*Time*: forward and backward against the same matrix products alone, not tiled: logits and the sum
over the vocabulary (4·N·H·V) for a frozen weight; logits twice and two gradients (8·N·H·V) for a
trained one. Both alternate in one run and the result is the median ratio, so that other load on the
machine affects both; a single CPU thread is measured in CPU time. For bf16 on a CPU there are two
baselines: products with float32 results, which the head needs, and PyTorch's own bf16 product,
which rounds every logit.

    N  targets   V  vocabulary   H  hidden size
"""

import argparse
import gc
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import torch
from result_file import processor, save_result
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_idpo.mcore.matmul import onednn_bf16_matmul
from megatron_idpo.plugin.logprobs import vocab_parallel_logprobs
from megatron_idpo.plugin.tiles import TileSizes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MB = 1e6
H100_CACHE_BYTES = 50_000_000
"""Its L2 cache. A larger one would make larger tiles."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all live tensors that operations have allocated, and their peak."""

    def __init__(self) -> None:
        """Start with no tensors."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and follow what it returns; views share a storage already known."""
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.follow(tensor)
        return result

    def follow(self, tensor: Tensor) -> None:
        """Count a tensor's memory until it is freed, unless it is counted already."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: object) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


class Sizes:
    """A problem and its inputs."""

    def __init__(self, tokens: int, hidden: int, vocab: int, dtype: torch.dtype) -> None:
        """N, H, V and the dtype of hidden states and weight."""
        self.tokens, self.hidden, self.vocab, self.dtype = tokens, hidden, vocab, dtype

    @classmethod
    def parse(cls, size: str, dtype: torch.dtype) -> "Sizes":
        """From `1024x576x49152`: N, H and V."""
        tokens, hidden, vocab = (int(n) for n in size.split("x"))
        return cls(tokens, hidden, vocab, dtype)

    def inputs(self, device: str, *, frozen: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states and weight (logits of unit variance), and targets."""
        hidden_NH = torch.randn(self.tokens, self.hidden, dtype=self.dtype, device=device)
        weight_VH = torch.randn(self.vocab, self.hidden, dtype=self.dtype, device=device)
        weight_VH.div_(self.hidden**0.5)
        targets_N = torch.randint(0, self.vocab, (self.tokens,), device=device)
        return hidden_NH.requires_grad_(), weight_VH.requires_grad_(not frozen), targets_N

    def results_bytes(self, *, frozen: bool) -> int:
        """What has to be there in the end: the hidden gradient, and `u` or the weight's."""
        rows = 2 * self.tokens if frozen else self.tokens + self.vocab
        return rows * self.hidden * self.dtype.itemsize

    def __str__(self) -> str:
        """`N=1024 H=576 V=49152 bf16`."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        return f"N={self.tokens} H={self.hidden} V={self.vocab} {names[self.dtype]}"


def head(inputs: tuple[Tensor, Tensor, Tensor], tiles: TileSizes | None = None) -> None:
    """Forward and backward; gradients stay in `.grad`."""
    loss = vocab_parallel_logprobs(*inputs, tiles=tiles).sum()
    loss.backward()  # type: ignore[no-untyped-call]


def extra_bytes(sizes: Sizes, device: str, *, frozen: bool) -> int:
    """Peak of live tensors beyond inputs and results, without contents.

    A meta tensor is not on a CPU, so it goes a GPU's way: its tiles, and 16-bit products with
    float32 results. It is not compiled; compiled code holds as much or less.
    """
    without_contents = FakeTensorMode() if device == "cpu" else nullcontext()
    with without_contents:
        inputs = sizes.inputs("cpu" if device == "cpu" else "meta", frozen=frozen)
        tensors = LiveBytes()
        for tensor in inputs:
            tensors.follow(tensor)
        before = tensors.live
        tiles = None if device == "cpu" else TileSizes.for_cache(H100_CACHE_BYTES, frozen=frozen)
        with tensors:
            head(inputs, tiles)
    return tensors.peak - before - sizes.results_bytes(frozen=frozen)


def resident_extra_bytes(sizes: Sizes, device: str, *, frozen: bool) -> int:
    """The same from a real run: the allocator's peak on a GPU, else the process's."""
    inputs = sizes.inputs(device, frozen=frozen)
    gc.collect()
    if device == "cuda":
        head(sizes.inputs(device, frozen=frozen))  # compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        head(inputs)
        peak = torch.cuda.max_memory_allocated()
    else:
        # Writing 5 makes Linux forget the peak so far.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        head(inputs)
        peak = _status_bytes("VmHWM")
    return peak - before - sizes.results_bytes(frozen=frozen)


def _status_bytes(name: str) -> int:
    """A line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this kernel does not report {name}")


def products(inputs: tuple[Tensor, Tensor, Tensor], *, frozen: bool, unrounded: bool) -> None:
    """The matrix products alone, whole; `unrounded` with float32 results from bf16 on a CPU."""
    hidden_NH, weight_VH = inputs[0].detach(), inputs[1].detach()
    if not unrounded:
        logits_NV = hidden_NH @ weight_VH.t()
        if not frozen:
            logits_NV = hidden_NH @ weight_VH.t()
            logits_NV.t() @ hidden_NH
        logits_NV @ weight_VH
        return
    with onednn_bf16_matmul(hidden_NH):
        widened = (hidden_NH.float(), weight_VH.float(), inputs[2])
        products(widened, frozen=frozen, unrounded=False)


def clock(device: str) -> float:
    """Seconds: of this thread on a single CPU thread, else of the wall, the GPU being done."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def ratios(
    sizes: Sizes, device: str, repeats: int, tiles: TileSizes | None, *, frozen: bool
) -> tuple[float, float, float | None]:
    """Median seconds of the products, and the head's median ratios to both yardsticks."""
    inputs = sizes.inputs(device, frozen=frozen)
    runs: dict[str, Callable[[], None]] = {
        "bare": lambda: products(inputs, frozen=frozen, unrounded=False),
        "head": lambda: head(inputs, tiles),
    }
    if device == "cpu" and sizes.dtype == torch.bfloat16:
        runs["unrounded"] = lambda: products(inputs, frozen=frozen, unrounded=True)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            inputs[0].grad = inputs[1].grad = None
            start = clock(device)
            run()
            if repeat:  # the first one warms up, and compiles on a GPU
                seconds[name].append(clock(device) - start)

    def ratio(other: str) -> float:
        pairs = zip(seconds["head"], seconds[other], strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    unrounded = ratio("unrounded") if "unrounded" in runs else None
    return statistics.median(seconds["bare"]), ratio("bare"), unrounded


def memory_table(sizes: Sizes, resident: Sizes | None, device: str) -> list[str]:
    """Lines of the report."""
    lines = ["## Memory", "", "| size | weight | measured | extra MB |", "|---|---|---|---|"]
    for frozen in (True, False):
        weight = "frozen" if frozen else "trainable"
        for way in ("cpu", "gpu"):
            extra = extra_bytes(sizes, way, frozen=frozen) / MB
            lines.append(f"| {sizes} | {weight} | tensors on a {way.upper()} | {extra:.0f} |")
        if resident is not None:
            extra = resident_extra_bytes(resident, device, frozen=frozen) / MB
            lines.append(f"| {resident} | {weight} | a real run on {device} | {extra:.0f} |")
    whole = sizes.tokens * sizes.vocab / MB
    return [
        *lines,
        "",
        f"Whole logits would be {2 * whole:.0f} MB in bf16, {4 * whole:.0f} in fp32.",
    ]


def time_table(options: argparse.Namespace) -> list[str]:
    """Lines of the report."""
    tiles = TileSizes(*options.tiles) if options.tiles else None
    lines = [
        f"## Time: {options.device}, {torch.get_num_threads()} CPU threads",
        "",
        "| size | weight | products alone, ms | head, ms | head / products "
        "| head / products, fp32 results |",
        "|---|---|---|---|---|---|",
    ]
    for size in options.sizes:
        for name in options.dtypes:
            sizes = Sizes.parse(size, DTYPES[name])
            for frozen in (True, False):
                bare_s, ratio, unrounded = ratios(
                    sizes, options.device, options.repeats, tiles, frozen=frozen
                )
                message = "" if unrounded is None else f"{unrounded:.2f}"
                weight = "frozen" if frozen else "trainable"
                times = f"{1e3 * bare_s:.1f} | {1e3 * bare_s * ratio:.1f}"
                lines.append(f"| {sizes} | {weight} | {times} | {ratio:.2f} | {message} |")
                print(lines[-1], flush=True)
    return [*lines, ""]


def machine() -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def main() -> None:
    """Print the report; save it on request."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--sizes", nargs="*", default=["1024x576x49152", "1024x2048x16384"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiles", type=int, nargs=2, help="tokens and vocabulary rows per tile")
    parser.add_argument("--memory-size", default="8192x4096x151936")
    parser.add_argument("--resident", metavar="SIZE", help="also run this size in bf16")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results/")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    lines = ["# Cost of the vocabulary head", "", f"    python {' '.join(sys.argv)}", ""]
    lines += [f"{date.today()}, {machine()}, torch {torch.__version__}", ""]
    memory = Sizes.parse(options.memory_size, torch.bfloat16)
    resident = Sizes.parse(options.resident, torch.bfloat16) if options.resident else None
    lines += [*memory_table(memory, resident, options.device), ""]
    print("\n".join(lines), flush=True)
    lines += time_table(options)
    if options.save:
        save_result("head", "\n".join(lines), machine())


if __name__ == "__main__":
    main()
