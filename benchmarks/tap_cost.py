"""Cost of one tap beyond plain DPO: time, compared with its FLOPs, and memory.

    OMP_NUM_THREADS=1 python benchmarks/tap_cost.py [--layers 8] [--repeats 5] [--save]

*Time* (one process, one thread, CPU time, fp32). A step is one micro-batch on megatron-core's own
schedule with DDP: forward, backward and `finalize_model_grads`, without the optimizer, which a tap
does not change. Every repeat measures three things in turn: a plain step (`layers: []`), a tapped
step (the layer at 0.69 of the depth), and the tap's matrix products alone, not tiled: `[N, H] x [H,
V]` and `[N, V] x [V, H]` for a frozen head (4*N*H*V FLOPs); for a trained head the first one twice,
and also `[V, N] x [N, H]` (8*N*H*V). The predictions are

* for the tap's extra seconds: the seconds of those products;
* for the tapped step: the plain step's seconds times the ratio of FLOPs. FLOPs of a plain step are
  counted from shapes: 2 per weight and position forward, the same for the gradient of activations
  and again for trained weights; attention's products over the pairs' visible positions (forward 2,
  backward 5 products); the final head as above.

Results are medians of each repeat's ratio, so that other load on the machine affects both sides.
The tap may be faster than its products, because its tiles of logits stay in the cache. "Frozen
head" is the case of LoRA for the head (embedding, final norm and output layer are not trained); the
layers' own weights are trained in both cases. Adapters would make the plain step shorter.

*Memory* (`--stages` processes, 1F1B, gloo). On every stage each allocated tensor is tracked until
it is freed. Live bytes are read at the start of every forward pass, with k micro-batches in flight;
their slope over k is the memory of a micro-batch. Tapped minus plain, in units of one micro-batch's
hidden state, is the memory of a tap: an inner layer's tensor is kept anyway for the next layer's
backward; that of a stage's last layer would be freed once it is sent. "Peak" is the tapped run's
peak of live bytes minus the plain run's. Weights, copies of the head and allocations inside kernels
are not counted.

    T  row positions   N  targets   H  hidden size   V  vocabulary
"""

import argparse
import shlex
import sys
from datetime import date
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from result_file import processor, save_result
from tap_runs import PAIR, Sizes, memory_case, time_case

from megatron_idpo.testing import WorkerPool

BAR = 1.15
"""Allowed time of a tap relative to its matrix products."""


class Flops(NamedTuple):
    """FLOPs of one micro-batch's forward and backward."""

    plain: int
    tap: int

    @classmethod
    def of(cls, sizes: Sizes, layer_weights: int, *, frozen: bool) -> "Flops":
        """Counted from shapes; see the module."""
        tap = (4 if frozen else 8) * sizes.targets * sizes.hidden * sizes.vocab
        prompt, *answers = PAIR
        visited = prompt * (prompt + 1) // 2
        visited += sum(answer * prompt + answer * (answer + 1) // 2 for answer in answers)
        attention = 7 * 2 * sizes.layers * sizes.pairs * visited * sizes.hidden
        return cls(6 * layer_weights * sizes.row_tokens + attention + tap, tap)


class Timed(NamedTuple):
    """Medians over the rounds of one case, also of each round's ratios."""

    plain_s: float
    products_s: float
    tap_s: float
    tap_to_products: float
    least: float
    most: float
    """Smallest and largest `tap_to_products` of all rounds."""

    step_to_plain: float
    flops: Flops

    @classmethod
    def of(cls, rounds_R3: NDArray[np.float64], flops: Flops) -> "Timed":
        """From seconds of plain step, tapped step and products in each round."""
        plain_R, tapped_R, products_R = rounds_R3.T
        tap_R = tapped_R - plain_R
        return cls(
            plain_s=float(np.median(plain_R)),
            products_s=float(np.median(products_R)),
            tap_s=float(np.median(tap_R)),
            tap_to_products=float(np.median(tap_R / products_R)),
            least=float(np.min(tap_R / products_R)),
            most=float(np.max(tap_R / products_R)),
            step_to_plain=float(np.median(tapped_R / plain_R)),
            flops=flops,
        )

    def __str__(self) -> str:
        """A row of the report without its first column."""
        flops = 1 + self.flops.tap / self.flops.plain
        return " | ".join(
            [
                f"{self.plain_s:.2f} s ({self.flops.plain / 1e9:.0f} GFLOP)",
                f"{self.flops.tap / 1e9:.0f} GFLOP",
                f"{self.products_s:.2f} s",
                f"{self.tap_s:.2f} s",
                f"**{self.tap_to_products:.2f}** ({self.least:.2f} to {self.most:.2f})",
                f"{self.step_to_plain:.3f}",
                f"{flops:.3f}",
                f"**{self.step_to_plain / flops:.3f}**",
            ]
        )


def time_table(pool: WorkerPool, sizes: Sizes, repeats: int) -> list[str]:
    """Lines of the report."""
    layer = round(0.69 * sizes.layers)
    lines = [
        f"## Time: {sizes}, N {sizes.targets}, tap at layer {layer}, fp32, 1 thread",
        "",
        "| head | plain step | tap's FLOPs | tap's products alone | tap measured | tap / products "
        "| tapped step / plain | its FLOPs / plain's | step / predicted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for frozen in (True, False):
        (times,) = pool.run(time_case, 1, sizes, layer, repeats, frozen=frozen, timeout_s=900)
        flops = Flops.of(sizes, times.layer_weights, frozen=frozen)
        timed = Timed.of(np.array(times.rounds), flops)
        lines.append(f"| {'frozen' if frozen else 'trainable'} | {timed} |")
    message = f"The limit for tap / products is {BAR}; medians of {repeats} rounds (their range)."
    return [*lines, "", message, ""]


def memory_table(pool: WorkerPool, sizes: Sizes, stages: int) -> list[str]:
    """Lines of the report: taps in the middle and at the end of every stage but the last."""
    per_stage = sizes.layers // stages
    ends = [per_stage * (stage + 1) for stage in range(stages - 1)]
    locations = {"an inner layer": [end - 1 for end in ends], "the stage's last layer": ends}
    hidden_bytes = 4 * sizes.row_tokens * sizes.hidden
    lines = [
        f"## Memory: {sizes}, {stages} stages, {2 * stages} micro-batches, fp32, frozen head",
        "",
        f"One hidden state is {hidden_bytes / 1e6:.2f} MB. "
        "Hidden states held per micro-batch in flight:",
        "",
        "| recompute | tap | stage | in flight | plain | tapped | the tap | peak, MB more |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for recompute in ("off", "full, every layer"):
        run = partial(pool.run, memory_case, stages, sizes, stages, timeout_s=300, frozen=True)
        plain = run([], recompute)
        for location, layers in locations.items():
            tapped = run(layers, recompute)
            for stage in range(stages - 1):
                in_flight = stages - 1 - stage  # forward passes before the first backward pass
                each = [
                    (held.at_forward[in_flight] - held.at_forward[0]) / in_flight / hidden_bytes
                    for held in (plain[stage], tapped[stage])
                ]
                peak = (tapped[stage].peak - plain[stage].peak) / 1e6
                lines.append(
                    f"| {recompute} | {location} | {stage} | {in_flight} | {each[0]:.2f} "
                    f"| {each[1]:.2f} | {each[1] - each[0]:.2f} | {peak:.2f} |"
                )
    return [*lines, ""]


def main() -> None:
    """Print the report; save it on request."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=576, help="a multiple of 192")
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--row-tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--memory-vocab", type=int, default=1024)
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results/")
    options = parser.parse_args()
    sizes = Sizes(options.layers, options.hidden, options.vocab, options.row_tokens)
    lines = [
        "# Cost of a tap",
        "",
        f"    python benchmarks/tap_cost.py {shlex.join(sys.argv[1:])}",
        "",
        f"{date.today()}, {processor()}, torch {torch.__version__}. How it is measured stands in "
        "the script.",
    ]
    with WorkerPool(max_workers=options.stages) as pool:
        lines += ["", *time_table(pool, sizes, options.repeats)]
        print("\n".join(lines), flush=True)
        memory = memory_table(pool, sizes._replace(vocab=options.memory_vocab), options.stages)
        print("\n".join(memory))
    if options.save:
        save_result("tap-cost", "\n".join([*lines, *memory]))


if __name__ == "__main__":
    main()
