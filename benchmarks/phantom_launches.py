"""Launches of one training step on a phantom GPU, by what they are for.

    python benchmarks/phantom_launches.py [ROW] [--uncompiled]

A row of `phantom_steps.py`, by default `8b-lora`. Kernels do nothing, but what is compiled in a run
is compiled here too, except FlexAttention, whose three kernels per layer and row are not counted.
`--uncompiled` counts operators instead, as `phantom_steps.py` does.

Launches are counted between the beginning and the end of modules and functions; in the backward
pass, of the autograd nodes that they have created.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any
from unittest.mock import patch

from megatron_idpo.testing.phantom_gpu import environment, run_python

REST = "losses, sums of gradients"
HEAD = "tiles of the head, twice"
MODULES = {
    "RMSNorm": "norms",
    "LinearAdapters": "LoRA: products",
    "ColumnParallelLinear": "linears",
    "RowParallelLinear": "linears",
    "RowAttention": "attention",
    "SelfAttention": "q, k, v apart",
    "MLP": "SwiGLU",
    "VariantLayer": "residual sums",
    "RowRotary": "rotary embedding",
}
"""Class of a module -> what its launches are for, except those of modules within it."""

FUNCTIONS = {
    "megatron_idpo.mcore.rope.rotation.rotate": "rotary embedding",
    "megatron_idpo.mcore.lora.linear.dropout_linear": "LoRA: dropout and A",
    "megatron_idpo.plugin.head.vocab_parallel_logprobs": HEAD,
    "megatron_idpo.mcore.optim.optimizer.TrainableModel.step": "optimizer",
    "megatron_idpo.mcore.optim.optimizer.TrainableModel.zero_grad_buffers": "optimizer",
}


class Origins:
    """Counts launches by the innermost scope that is open."""

    def __init__(self) -> None:
        """Nothing is counted yet."""
        self.counts: Counter[str] = Counter()
        self._open = [REST]
        self._last = 0

    def start(self) -> None:
        """Forget what was counted."""
        self._mark()
        self.counts.clear()

    def result(self) -> dict[str, int]:
        """Launches since the start, by origin."""
        self._mark()
        return {origin: launches for origin, launches in self.counts.items() if launches}

    def enter(self, origin: str) -> None:
        """A scope begins."""
        self._mark()
        self._open.append(origin)

    def leave(self) -> str:
        """The innermost scope ends."""
        self._mark()
        return self._open.pop()

    def tag(self, result: Any, origin: str) -> None:
        """Count the backward pass of a result's nodes, unless an inner scope has them."""
        from torch import Tensor
        from torch.utils._pytree import tree_leaves

        nodes = [leaf.grad_fn for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        while nodes:
            node = nodes.pop()
            if node is None:
                continue
            metadata: Any = node.metadata  # torch's stub has a method
            if "origin" in metadata:
                continue
            name = "DDP: gradients" if node.name() == "torch::autograd::AccumulateGrad" else origin
            metadata["origin"] = name
            node.register_prehook(partial(self._before, name))
            node.register_hook(self._after)
            nodes += [following for following, _ in node.next_functions]

    def _before(self, origin: str, *_: Any) -> None:
        self.enter(origin)

    def _after(self, *_: Any) -> None:
        self.leave()

    def _mark(self) -> None:
        from megatron_idpo.testing.phantom_gpu.counters import Counts

        counts = Counts.now()
        launches = counts.launches + counts.gemms
        self.counts[self._open[-1]] += launches - self._last
        self._last = launches

    def scoped(self, function: Callable[..., Any], origin: str) -> Callable[..., Any]:
        """`function` in a scope."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            # Nodes of the inputs that no scope has had yet are not of this one.
            self.tag((args, kwargs), self._open[-1])
            self.enter(origin)
            try:
                result = function(*args, **kwargs)
            finally:
                self.leave()
            self.tag(result, origin)
            return result

        return call

    def watch(self, step: Any) -> None:
        """Open scopes in a `TrainStep`'s modules."""
        for chunk in step.policy.trainable.model:
            for module in chunk.modules():
                origin = MODULES.get(type(module).__name__)
                if origin is not None:
                    module.forward = self.scoped(module.forward, origin)


def main() -> None:
    """Print the table of one row."""
    from phantom_steps import LAYOUTS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", nargs="?", default="8b-lora", choices=list(LAYOUTS))
    parser.add_argument("--uncompiled", action="store_true", help="count operators")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_process:
        print(json.dumps(count(LAYOUTS[arguments.row])))
        return
    variables = environment(arithmetic="none") | {"PHANTOM_GPU_COPY_BYTES": str(1 << 20)}
    if not arguments.uncompiled:
        variables |= {"TORCHDYNAMO_DISABLE": "0"}
    ran = run_python(["-W", "ignore", __file__, arguments.row, "--in-process"], variables)
    if ran.code:
        raise SystemExit(ran.stderr)
    print(table(json.loads(ran.stdout.splitlines()[-1]), LAYOUTS[arguments.row]))


def table(counts: dict[str, int], layout: Any) -> str:
    """Markdown: launches of a step, and of one layer and row."""
    from phantom_steps import MODELS

    layers = MODELS[layout.model]["num_hidden_layers"] // layout.pipeline * layout.rows
    lines = ["| origin | launches | of a layer and row |", "|---|---|---|"]
    total = sum(counts.values())
    for origin, launches in [*sorted(counts.items(), key=lambda item: -item[1]), ("all", total)]:
        is_of_layers = origin not in (HEAD, "optimizer", "all")
        lines.append(
            f"| {origin} | {launches:,} | {launches / layers:.1f} |"
            if is_of_layers
            else f"| {origin} | {launches:,} | |"
        )
    return "\n".join(lines)


def count(layout: Any) -> dict[str, int]:
    """Launches of the third step, by origin."""
    from pkgutil import resolve_name

    from phantom_steps import MODELS, _batch, _config, uncompiled_attention

    from megatron_idpo.mcore.megatron_warnings import suppress_megatron_warnings

    with suppress_megatron_warnings(), ExitStack() as stack:
        from megatron_idpo.mcore.model.architecture import Architecture
        from megatron_idpo.mcore.parallel.world import running_layout
        from megatron_idpo.testing.phantom_gpu.device import phantom
        from megatron_idpo.testing.random_step import random_step

        config, origins = _config(layout), Origins()
        stack.enter_context(phantom(world=(layout.rank, layout.world)))
        stack.enter_context(running_layout(config.layout))
        stack.enter_context(uncompiled_attention())
        for path, origin in FUNCTIONS.items():
            scoped = origins.scoped(resolve_name(path), origin)
            stack.enter_context(patch(path, scoped))
        architecture = Architecture.from_hf(MODELS[layout.model])
        step = stack.enter_context(random_step(config, architecture, is_alone=True))
        origins.watch(step)
        batch = _batch(layout)
        for index in (1, 2):  # the first compiles
            step.train(batch, index, lr=1e-4)
        origins.start()
        step.train(batch, 3, lr=1e-4)
    return origins.result()


if __name__ == "__main__":
    main()
