"""A stand-in for Transformer Engine on a CPU: its names, parameters and signatures in plain torch.

`install()` before megatron-core is imported; then megatron-core takes it for Transformer Engine.
Signatures are closed: an argument that megatron-core adds fails instead of being ignored. Dense
layers, experts, and attention without context parallelism; no FP8, and no biases of row-parallel
linears.

    S  positions   B  batch   N  heads   D  head size   T  packed positions
"""

import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

VERSION = "2.9.0"


class _TeModule(torch.nn.Module):
    """Modules save an extra state, which is empty without FP8."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        pass

    def set_tensor_parallel_group(self, group: Any) -> None:
        self.tp_group = group


class Linear(_TeModule):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: Any = "cpu",
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: Any = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert not (fuse_wgrad_accumulation or delay_wgrad_compute)
        assert not bias or (parallel_mode == "column" and not return_bias)
        self.tp_group, self.tp_size, self.parallel_mode = tp_group, tp_size, parallel_mode
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.return_bias, self.use_bias = return_bias, bias
        self.save_original_input = save_original_input
        shape = [out_features, in_features]
        if parallel_mode is not None:
            shape[parallel_mode == "row"] //= tp_size
        self.weight = torch.nn.Parameter(torch.zeros(shape, dtype=params_dtype, device=device))
        self.weight.tensor_model_parallel = parallel_mode is not None
        self.weight.partition_dim = int(parallel_mode == "row")
        self.weight.partition_stride = 1
        self.bias = None
        if bias:
            zeros = torch.zeros(shape[0], dtype=params_dtype, device=device)
            self.bias = torch.nn.Parameter(zeros)
            self.bias.tensor_model_parallel, self.bias.partition_dim = True, 0
            self.bias.partition_stride = 1

    def forward(
        self, inp: Tensor, is_first_microbatch: Any = None, fp8_output: bool = False
    ) -> Any:
        from megatron.core.tensor_parallel import mappings

        if self.tp_size > 1 and self.parallel_mode == "column":
            names = ("copy_to_tensor_model_parallel", "gather_from_sequence_parallel")
            before = getattr(mappings, f"{names[self.sequence_parallel]}_region")
            inp = before(inp, group=self.tp_group)
        out = F.linear(inp, self.weight, self.bias)
        if self.tp_size > 1 and self.parallel_mode == "row":
            names = ("reduce_from_tensor_model_parallel", "reduce_scatter_to_sequence_parallel")
            after = getattr(mappings, f"{names[self.sequence_parallel]}_region")
            out = after(out, group=self.tp_group)
        return (out, None) if self.return_bias else out


class GroupedLinear(_TeModule):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cpu",
        ub_overlap_rs: bool = False,
        ub_overlap_ag: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        save_original_input: bool = False,
    ) -> None:
        super().__init__()
        assert not (bias or return_bias or fuse_wgrad_accumulation or delay_wgrad_compute)
        assert tp_size == 1, "megatron-core splits experts itself"
        self.num_gemms, self.use_bias, self.tp_size = num_gemms, bias, tp_size
        self.in_features, self.out_features = in_features, out_features
        self.fp8_meta = {"fp8_checkpoint": False}
        self.fp8 = self.fp8_calibration = False
        for index in range(num_gemms):
            weight = torch.zeros(out_features, in_features, dtype=params_dtype, device=device)
            parameter = torch.nn.Parameter(weight)
            parameter.tensor_model_parallel, parameter.partition_dim = True, 0
            self.register_parameter(f"weight{index}", parameter)

    def forward(self, inp: Tensor, m_splits: list[int], is_first_microbatch: Any = None) -> Tensor:
        parts = inp.split(list(m_splits))
        weights = (getattr(self, f"weight{index}") for index in range(self.num_gemms))
        return torch.cat([F.linear(*both) for both in zip(parts, weights, strict=True)])


class LayerNormLinear(Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        *,
        normalization: str = "LayerNorm",
        zero_centered_gamma: bool = False,
        return_layernorm_output: bool = False,
        **linear: Any,
    ) -> None:
        super().__init__(in_features, out_features, **linear)
        assert normalization == "RMSNorm" and not zero_centered_gamma
        self.return_layernorm_output, self.eps = return_layernorm_output, eps
        ones = torch.ones(in_features, dtype=self.weight.dtype, device=self.weight.device)
        self.layer_norm_weight = torch.nn.Parameter(ones)
        self.layer_norm_weight.sequence_parallel = linear.get("sequence_parallel", False)

    def forward(
        self, inp: Tensor, is_first_microbatch: Any = None, fp8_output: bool = False
    ) -> Any:
        normed = F.rms_norm(inp, inp.shape[-1:], self.layer_norm_weight, self.eps)
        out = super().forward(normed)
        if not self.return_layernorm_output:
            return out
        return (*out, normed) if self.return_bias else (out, normed)


class RMSNorm(torch.nn.Module):
    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        device: Any = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert not zero_centered_gamma
        ones = torch.ones(normalized_shape, dtype=params_dtype or dtype, device=device)
        self.eps, self.weight = eps, torch.nn.Parameter(ones)
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class DotProductAttention(_TeModule):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: Any = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: Any = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool = False,
    ) -> None:
        super().__init__()
        assert not attention_dropout and softmax_type == "vanilla" and not return_max_logit
        assert window_size is None or window_size[0] < 0
        assert cp_group is None or cp_group.size() == 1
        self.qkv_format, self.attn_mask_type, self.scale = qkv_format, attn_mask_type, softmax_scale

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Any = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: Any = None,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Any = None,
        pad_between_seqs: Any = None,
        num_splits: int = 1,
    ) -> Tensor:
        layout = qkv_format or self.qkv_format
        assert "causal" in (attn_mask_type or self.attn_mask_type) and core_attention_bias is None
        if layout == "thd":
            assert "padding" in (attn_mask_type or self.attn_mask_type) and cu_seqlens_q is not None
            assert cu_seqlens_q_padded is None, "padding between sequences"
            sizes = cu_seqlens_q.diff().tolist()
            assert sum(sizes) == len(query_layer)
            parts = zip(
                *(x.split(sizes) for x in (query_layer, key_layer, value_layer)), strict=True
            )
            return torch.cat([self._attend(*(x[:, None] for x in part))[:, 0] for part in parts])
        assert layout == "sbhd"
        return self._attend(query_layer, key_layer, value_layer)

    def _attend(self, *qkv: Tensor) -> Tensor:
        """`[S, B, N, D]` each to `[S, B, N * D]`."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in qkv)
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)


class _Absent:
    """What megatron-core names but this stand-in does not have."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise AssertionError(f"{type(self).__name__} is not in the stand-in")


class _Fp8State:
    is_fp8_enabled = is_fp8_calibration = is_first_fp8_module = staticmethod(lambda: False)
    get_fp8_recipe = reset = staticmethod(lambda: None)


@contextmanager
def _fp8_off(enabled: bool = False, **_: Any) -> Any:
    assert not enabled
    yield


@contextmanager
def _recompute(activation_recompute: bool = False, recompute_phase: bool = False) -> Any:
    yield


def install() -> None:
    """Make `import transformer_engine` find this module's classes."""
    absent = {name: type(name, (_Absent,), {}) for name in _ABSENT.split()}
    recipes = {name: type(name, (_Absent,), {}) for name in _RECIPES.split()}
    layers = {kind.__name__: kind for kind in (Linear, LayerNormLinear, GroupedLinear, RMSNorm)}
    layers |= {"DotProductAttention": DotProductAttention}
    layers |= {"LayerNorm": absent["LayerNorm"]}
    fp8 = {"fp8_autocast": _fp8_off, "fp8_model_init": _fp8_off}
    contents: dict[str, dict[str, Any]] = {
        "": {"__version__": VERSION},
        ".common": {},
        ".common.recipe": recipes,
        ".pytorch": {**layers, **fp8},
        ".pytorch.fp8": {**fp8, "FP8GlobalStateManager": _Fp8State},
        ".pytorch.attention": {"DotProductAttention": DotProductAttention},
        ".pytorch.module": {},
        ".pytorch.module.base": {
            "TransformerEngineBaseModule": type("TransformerEngineBaseModule", (), {}),
            "get_dummy_wgrad": lambda shape, dtype, zero=False: torch.zeros(shape, dtype=dtype),
        },
        ".pytorch.ops": absent,
        ".pytorch.tensor": {"QuantizedTensor": type("QuantizedTensor", (), {})},
        ".pytorch.router": dict.fromkeys(_ROUTER.split()),
        ".pytorch.distributed": {
            "activation_recompute_forward": _recompute,
            "checkpoint": None,
            "is_fp8_activation_recompute_enabled": lambda: False,
            "in_fp8_activation_recompute_phase": lambda: False,
            "CudaRNGStatesTracker": type("CudaRNGStatesTracker", (), {}),
        },
    }
    for suffix, values in contents.items():
        name = f"transformer_engine{suffix}"
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        vars(module).update(values)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


_ABSENT = (
    "LayerNorm GroupedLinear Sequential MakeExtraOutput SwiGLU GEGLU ReGLU GELU ReLU SiLU "
    "FusibleOperation BasicLinear Bias ReduceScatter AllReduce RMSNorm ScaledSwiGLU"
)
_RECIPES = (
    "DelayedScaling Float8CurrentScaling MXFP8BlockScaling Float8BlockScaling NVFP4BlockScaling "
    "CustomRecipe Format"
)
_ROUTER = "fused_compute_score_for_moe_aux_loss fused_moe_aux_loss fused_topk_with_score_function"
