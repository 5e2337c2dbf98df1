"""Activations of one rank: what layers keep for their backward pass, and temporaries.

The formulas follow the code that allocates, and are compared with torch's allocator on phantom
GPUs (`tests/plan/test_memory_on_phantom.py`). What a layer keeps, in elements, for one row of T
positions (t of them between the linears, fewer under sequence parallelism):

    norms and their inputs       4·t·H     a norm's output only if a linear there is trained
    fused query, key and value   T·(Q+2K)  kept whole, because the value is a view of it
    rotated query and key        T·(Q+K)   and cos and sin, 4·T·D
    attention                    T·Q       and a float32 log-sum-exp per head
    MLP                          T·2F      and T·F if the last linear is trained or adapted
    MLP with gelu                T·2F      more: both factors of the product
    expert for all tokens        T·2S      T·S if it is trained, and 2·t·H
    experts instead of an MLP    N·(5F+H)  and 2·t·H, for N tokens of this rank's experts

Q, K and F are divided by the tensor-parallel ranks. `recompute: selective` keeps as much: fused
attention stores no scores. Temporaries of an activation's backward pass are counted as torch
allocates them uncompiled; compiled, they are 2·T·F fewer.

    H  hidden size   Q  features of query heads   K  of key heads   D  of a head   F  of the MLP
    S  of the expert for all tokens
"""

from collections.abc import Iterator

from megatron_idpo.plan.run_sizes import RunSizes

FLOAT32 = 4

_TILE_BYTES = 33.6e6
"""Float32 logits of one tile of the head; they fit into an H100's L2 cache (`plugin.tiles`)."""

_TILE_TOKENS = 1024
_TILE_VOCABULARY = 4096
"""`plugin.tiles.TileSizes` there: targets where the head is frozen, rows where it is trained."""

_MLP_TEMPORARIES = 4
_EXPERT_TEMPORARIES = 6
"""T·F and N·F elements in the backward pass of an activation, more than were kept for it."""


def layer_bytes(run: RunSizes) -> float:
    """What one layer keeps of one row, without recomputation."""
    model, tensor = run.model, run.layout.tensor
    hidden = run.sharded_positions * model.hidden_size
    queries = run.positions * model.query_width // tensor
    keys = run.positions * model.key_width // tensor
    heads = (model.num_heads + model.num_kv_heads) // tensor
    elements = hidden * (2 + run.adapts("q_proj", "k_proj", "v_proj"))
    if model.has_pre_norms and model.has_post_norms:
        elements += 2 * hidden  # the inputs of both
    elements += (queries + 2 * keys) + (queries + keys) + queries
    elements += 4 * run.positions * model.head_dim
    statistics = run.positions * model.num_heads // tensor + 2 * run.sharded_positions
    if model.qk_norm:
        elements += queries
        statistics += run.positions * heads
    if model.num_experts:
        tokens = expert_tokens(run)
        features = model.ffn_hidden_size // run.expert_tensor
        elements += 2 * hidden + tokens * (5 * features + model.hidden_size)
        statistics += 3 * run.sharded_positions * model.num_experts
        if run.lora is not None:
            ranks = map(run.lora.rank_of, run.lora.expert_parameters)
            elements += 2 * tokens * sum(ranks)
        if model.shared_ffn_hidden_size:
            # The expert for all tokens has no adapters; its gate keeps its output.
            features = run.positions * model.shared_ffn_hidden_size // tensor
            elements += 2 * hidden + features * (2 + (run.lora is None))
    else:
        features = run.positions * model.ffn_hidden_size // tensor
        elements += hidden * run.adapts("gate_proj", "up_proj")
        elements += features * (2 + run.adapts("down_proj"))
        elements += features * 2 * model.uses_gelu  # megatron-core fuses SiLU only
    if run.lora is not None:
        elements += run.positions * run.lora.rank * len(run.lora.projections)
    return elements * run.width + statistics * FLOAT32


def dropout_mask_bytes(run: RunSizes, stage: int) -> float:
    """Masks of the adapters' dropout for all rows in flight, on a CPU; a GPU draws them again.

    One byte for each element of the input of each adapted projection
    (`mcore/lora/products.py`, `dropout_linear`).
    """
    if run.lora is None or not run.lora.dropout:
        return 0.0
    model, tensor = run.model, run.layout.tensor
    widths = dict.fromkeys(run.lora.projections, float(model.hidden_size))
    widths["o_proj"] = model.query_width / tensor
    widths["down_proj"] = model.ffn_hidden_size / tensor
    layer = run.positions * sum(widths[name] for name in run.lora.projections)
    total = 0.0
    for count, (_, layers) in zip(rows_in_flight(run, stage), run.chunks(stage), strict=True):
        recomputed = run.recomputed(layers)
        # Of the recomputed layers, one at a time has its masks.
        total += layer * (count * (len(layers) - recomputed) + min(recomputed, 1))
    return total


def gathered_bytes(run: RunSizes) -> float:
    """Keys and values of the whole row, of one layer: context-parallel ranks gather them."""
    if run.layout.context == 1:
        return 0.0
    return 2 * run.row_tokens * run.model.key_width // run.layout.tensor * run.width


def expert_tokens(run: RunSizes) -> int:
    """Tokens of a row that one rank's experts compute, if all experts are chosen equally often."""
    return run.sharded_positions * run.model.experts_per_token * run.expert_tensor


def layer_temporaries(run: RunSizes) -> float:
    """The most that a layer's backward pass allocates in addition to what its forward has kept."""
    model, width = run.model, run.width
    hidden = run.sharded_positions * model.hidden_size * width
    if not model.num_experts:
        features = run.positions * model.ffn_hidden_size // run.layout.tensor * width
        gradient = 0.0
        if run.lora is None:  # of the first linear; activations of the second are free by then
            gradient = 2 * model.hidden_size * model.ffn_hidden_size // run.layout.tensor * width
            gradient -= features
        return hidden + max(_MLP_TEMPORARIES * features, gradient)
    tokens = expert_tokens(run)
    received = tokens * model.hidden_size * width
    features = tokens * model.ffn_hidden_size // run.expert_tensor * width
    gradient = 0.0
    if run.lora is None:
        experts = model.num_experts // run.layout.expert * width
        gradient = 2 * experts * model.hidden_size * model.ffn_hidden_size / run.expert_tensor
        gradient += received - 3 * features
    # Tokens are copied four times on their way to the experts and back.
    # By the activation's backward pass one copy has been freed.
    return hidden + max(_EXPERT_TEMPORARIES * features - received, gradient, 4 * received)


def head_temporaries(run: RunSizes, *, is_tap: bool) -> float:
    """What reading one layer of one row allocates: the gather of positions, tiles, gradients."""
    model, width, scored = run.model, run.width, run.scored_tokens
    read = scored * model.hidden_size
    total = read * width + _TILE_BYTES
    if run.layout.sequence_parallel:
        total += (run.positions + run.sharded_positions) * model.hidden_size * width
    if is_tap:
        total += read * (width + FLOAT32 if run.lora else 2 * width)
    if run.lora is None:
        weight = run.vocab_rows * model.hidden_size * width
        tile = min(_TILE_VOCABULARY, run.vocab_rows) * model.hidden_size * FLOAT32
        return total + weight + read * FLOAT32 + (2 * tile if width < FLOAT32 else 0)
    tile = min(_TILE_TOKENS, scored) * model.hidden_size * FLOAT32
    return total + max(2.5 * tile - _TILE_BYTES, _TILE_BYTES / 2)


def chunk_bytes(run: RunSizes, stage: int, chunk: int, layers: range) -> float:
    """What a chunk keeps of one row until the row's backward pass."""
    model = run.model
    hidden = run.sharded_positions * model.hidden_size * run.width
    recomputed = run.recomputed(layers)
    kept = recomputed * hidden + (len(layers) - recomputed) * layer_bytes(run)
    kept += run.positions * model.head_dim * FLOAT32  # angles of the rotary embedding
    if layers.stop > model.num_layers:
        # The final norm's input, and the head's gradient (frozen) or input (trained).
        head = FLOAT32 if run.lora else run.width
        kept += hidden + run.scored_tokens * model.hidden_size * head
    elif layers[-1] in run.taps:
        kept += hidden
    return kept


def rows_in_flight(run: RunSizes, stage: int) -> list[int]:
    """How many rows each chunk of a stage keeps at once, in megatron-core's schedules."""
    stages, chunks = run.layout.pipeline, run.layout.virtual_pipeline
    if chunks == 1:
        return [min(run.most_rows, stages - stage)]
    # Interleaved: groups of `stages` rows run through one chunk after another, until the backward
    # passes begin.
    begun = (stages - stage - 1) * 2 + (chunks - 1) * stages + 1
    counts = [0] * chunks
    for unit in range(min(begun, run.most_rows * chunks)):
        counts[unit // stages % chunks] += 1
    return counts


def peak(run: RunSizes, stage: int) -> tuple[float, float]:
    """Activations of all rows in flight, and the temporaries at the peak of a step.

    The peak is in the backward pass of one row, in its last layer, a recomputed one, or a head;
    which of them depends on the sizes.
    """
    counts, chunks = rows_in_flight(run, stage), list(run.chunks(stage))
    kept = [chunk_bytes(run, stage, chunk, layers) for chunk, layers in chunks]
    activations = sum(count * size for count, size in zip(counts, kept, strict=True))
    highest = max(
        above
        for (_, layers), size in zip(chunks, kept, strict=True)
        for above in _above_kept(run, layers, size)
    )
    if run.layout.pipeline > 1:  # a gradient that arrives, an output that leaves
        highest += 2 * run.sharded_positions * run.model.hidden_size * run.width
    return activations, max(highest, 0.0)


def _above_kept(run: RunSizes, layers: range, kept: float) -> Iterator[float]:
    """Temporaries at each moment of a row's backward pass, less what has been freed by then."""
    recomputed = run.recomputed(layers)
    layer, hidden = layer_bytes(run), run.sharded_positions * run.model.hidden_size * run.width
    is_last = layers.stop > run.model.num_layers
    if is_last:
        yield head_temporaries(run, is_tap=False)
    tail = kept - recomputed * hidden - (len(layers) - recomputed) * layer
    waiting = 0.0
    if is_last and layers.start == 1 and run.model.tied_embeddings and run.lora is None:
        # Autograd keeps the head's gradient of a tied weight until that of the embedding is there.
        waiting = run.vocab_rows * run.model.hidden_size * run.width
        yield 2 * waiting - kept
    elif layers.start == 1 and run.lora is None:
        # Last of all, the embedding's gradient: as large as the embedding, if few rows are kept.
        yield run.vocab_rows * run.model.hidden_size * run.width + hidden - kept
    if recomputed < len(layers):
        yield layer_temporaries(run) + waiting - tail + hidden
    if recomputed:
        freed = (len(layers) - recomputed) * layer + tail
        if run.model.num_experts:  # the second norm's tensors, by the experts' backward pass
            freed += 3 * hidden
        yield layer + layer_temporaries(run) + waiting + hidden - freed
    for tap in run.taps_in(layers):
        below = tap - layers.start + 1
        freed = kept - min(below, recomputed) * hidden - max(below - recomputed, 0) * layer
        again = layer if below <= recomputed else 0.0
        yield head_temporaries(run, is_tap=True) + again + waiting + 2 * hidden - freed
