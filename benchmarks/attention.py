"""Time of attention over a shared-prompt row, on the available device.

For each prompt and answer length a row is filled with equal pairs. Three variants are timed,
forward and backward, per pair: the shared-prompt row, the same pairs with repeated prompts
(`share_prompt: false`), and a causal batch of whole sequences, as DPO trainers usually run it
(equal pairs need no padding, which favors it).

    python benchmarks/attention.py [--row-tokens 2048] [--dtypes fp32,bf16] [--threads 1]

The result is the best of several runs. A single CPU thread is measured in CPU time, because the
machine may have other load.

Shape suffixes: `T` positions, `B` batch, `N` query heads, `M` key-value heads, `D` head size.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_idpo.mcore.attention.row_attention import RowAttention
from megatron_idpo.mcore.attention.row_params import RowParams

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT_TOKENS = (50, 200, 700)
ANSWER_TOKENS = (30, 100, 200)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Settings shared by all measurements."""

    device: torch.device
    dtype: torch.dtype
    row_tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    repeats: int

    def attention(self) -> RowAttention:
        """One layer's core attention."""
        return RowAttention(
            TransformerConfig(
                num_layers=1,
                hidden_size=self.heads * self.head_dim,
                num_attention_heads=self.heads,
                num_query_groups=self.kv_heads,
                kv_channels=self.head_dim,
                attention_dropout=0.0,
            ),
            layer_number=1,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
        )

    def tensors(self, tokens: int, batch: int) -> list[Tensor]:
        """Query, key and value with gradients, and the gradient of the output."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        shapes = [(tokens, batch, n, self.head_dim) for n in heads]
        tensors = [torch.randn(shape, dtype=self.dtype, device=self.device) for shape in shapes]
        grad = torch.randn_like(tensors[0]).flatten(2)
        return [*(x.requires_grad_() for x in tensors), grad]

    def seconds(self, run: Callable[[], object]) -> float:
        """Seconds of the best run, after two warm-up runs (which compile on a GPU)."""
        one_thread = self.device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.process_time if one_thread else time.perf_counter
        times = []
        for i in range(self.repeats + 2):
            self._synchronize()
            start = clock()
            run()
            self._synchronize()
            if i >= 2:
                times.append(clock() - start)
        return min(times)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def row_of(groups: list[tuple[int, int, int]], row_tokens: int, device: torch.device) -> RowParams:
    """A row of groups given as (prompt, chosen, rejected) lengths; the rest is padding."""
    positions, spans, end = torch.zeros(row_tokens, dtype=torch.int64), [], 0
    for prompt, chosen, rejected in groups:
        b0, b1 = end, end + prompt
        b2, b3 = b1 + chosen, b1 + chosen + rejected
        positions[b0:b2] = torch.arange(prompt + chosen)
        positions[b2:b3] = torch.arange(prompt, prompt + rejected)
        spans.append((b0, b1, b2, b3))
        end = b3
    return RowParams.of(positions.to(device), torch.tensor(spans, dtype=torch.int32))


def forward_and_backward_s(bench: Bench, row: RowParams | None, tokens: int, batch: int) -> float:
    """Seconds for one layer over a row, or without one over plain causal sequences."""
    attention = bench.attention()
    *inputs, grad = bench.tensors(tokens, batch)

    def run() -> None:
        for x in inputs:
            x.grad = None
        attention(*inputs, None, packed_seq_params=row).backward(grad)

    return bench.seconds(run)


def measure(bench: Bench, prompt: int, answer: int) -> tuple[int, float, float, float]:
    """Pairs in a row, and milliseconds per pair: shared, repeated and padded."""
    pairs = max(1, bench.row_tokens // (prompt + 2 * answer))
    row_tokens = max(bench.row_tokens, pairs * (prompt + 2 * answer))
    shared = row_of([(prompt, answer, answer)] * pairs, row_tokens, bench.device)
    # Repeated prompts need more positions; a longer row keeps the number of pairs.
    length, sequences = prompt + answer, 2 * pairs
    repeated = row_of([(length, 0, 0)] * sequences, length * sequences, bench.device)
    times = (
        forward_and_backward_s(bench, shared, shared.row_tokens, 1),
        forward_and_backward_s(bench, repeated, repeated.row_tokens, 1),
        forward_and_backward_s(bench, None, length, sequences),
    )
    shared_ms, repeated_ms, padded_ms = (1e3 * seconds / pairs for seconds in times)
    return pairs, shared_ms, repeated_ms, padded_ms


def main() -> None:
    """Print one line per dtype and pair of lengths."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--row-tokens", type=int, default=2048)
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--heads", default="9,3,64", help="query heads, key-value heads, head size")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heads, kv_heads, head_dim = (int(n) for n in arguments.heads.split(","))
    print(
        f"device {device}, threads {arguments.threads}, heads {arguments.heads}; fwd+bwd per pair"
    )
    print("dtype  prompt  answer  pairs/row  shared ms  repeated ms  padded ms  repeated/shared")
    for name in arguments.dtypes.split(","):
        bench = Bench(
            device=device,
            dtype=DTYPES[name],
            row_tokens=arguments.row_tokens,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            repeats=arguments.repeats,
        )
        gains = []
        for prompt in PROMPT_TOKENS:
            for answer in ANSWER_TOKENS:
                pairs, shared_ms, repeated_ms, padded_ms = measure(bench, prompt, answer)
                gains.append(repeated_ms / shared_ms)
                print(
                    f"{name:5}  {prompt:6}  {answer:6}  {pairs:9}  {shared_ms:9.2f}"
                    f"  {repeated_ms:11.2f}  {padded_ms:9.2f}  {gains[-1]:15.2f}",
                    flush=True,
                )
        print(f"{name:5}  geometric mean of repeated/shared {statistics.geometric_mean(gains):.2f}")


if __name__ == "__main__":
    main()
