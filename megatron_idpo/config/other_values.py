"""Values of other programs that our fields do not take; see `other_names.py`."""

from collections.abc import Mapping
from types import MappingProxyType

_NOT_SUPPORTED = "is not supported (docs/losses.md)"
_LOSSES_BY_HINT: Mapping[str, str] = {
    "use sigmoid, which is DPO": "dpo logistic logsigmoid vanilla",
    "use sigmoid, and set objective.label_smoothing": "cdpo conservative_dpo c_dpo",
    "use robust, and set objective.label_smoothing": "robust_dpo",
    "use sigmoid_norm": "dpo_norm ln_dpo length_normalized_dpo norm_dpo",
    "use bco_pair, which has no reward shift": "bco",
    "use exo_pair, and set objective.label_smoothing to 0.001": "exo",
    "use nca_pair": "nca",
    "use sppo_hard": "sppo",
    "use apo_zero or apo_down": "apo",
    "use discopop": "lrml discopo",
    "use aot_unpaired": "aot_pair",
    "use hinge": "slic slic_hf",
    "use sigmoid with objective.wpo: true": "wpo",
    "use sigmoid, and set objective.f_divergence": "fdpo f_dpo f-dpo",
    "use [sigmoid, bco_pair, sft] with objective.loss_weights: [0.8, 0.2, 1.0]": "mpo",
    "use sigmoid with objective.nll_weight (iterative RPO)": "irpo",
    "use sigmoid with objective.nll_weight (iterative RPO); reward-aware RPO is not supported": """
        rpo""",
    "use sigmoid, and name the layers in objective.layers": "idpo intermediate_dpo",
    "use sigmoid, and add the section sdpo": "sdpo stepwise_dpo",
    "reward-aware RPO is not supported": "rpo_sq rpo_bwd_kl rpo_fwd_kl",
    f"SimPO (no reference, a target margin) {_NOT_SUPPORTED}": "simpo",
    f"KTO {_NOT_SUPPORTED}; bco_pair is another loss of single answers": "kto kto_pair",
    f"ORPO {_NOT_SUPPORTED}": "orpo",
    f"CPO {_NOT_SUPPORTED}": "cpo",
    f"LD-DPO {_NOT_SUPPORTED}": "lddpo ld_dpo ld",
    f"TR-DPO {_NOT_SUPPORTED}; the section sdpo changes the reference between steps": """trdpo
        tr_dpo""",
    "online methods are not supported": "grpo ppo rloo gspo online_dpo reinforce",
}

_NO_SCHEDULE = "is not supported: use cosine, linear or constant"
_STEPS = "write a number of steps"
_EVERY_STEPS = dict.fromkeys(("0", "-1", "no", "none", "false"), "write null") | {
    "<str>": _STEPS,
    "<bool>": _STEPS,
    "<float>": f"{_STEPS}, not a share of them",
}

OTHER_VALUES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "objective.loss": {
            name: hint for hint, names in _LOSSES_BY_HINT.items() for name in names.split()
        },
        "optimizer.schedule": {
            "constant_with_warmup": "use constant, with optimizer.warmup_steps",
            "linear_with_warmup": "use linear, with optimizer.warmup_steps",
            "cosine_with_warmup": "use cosine, with optimizer.warmup_steps",
            "cosine_with_min_lr": "use cosine, with optimizer.min_lr",
            "cosineannealing": "use cosine, with optimizer.min_lr",
            "cosine_warmup_with_min_lr": "use cosine, with optimizer.min_lr",
        }
        | dict.fromkeys(
            "polynomial inverse_sqrt inverse-square-root cosine_with_restarts wsd rex one_cycle "
            "warmup_stable_decay reduce_lr_on_plateau".split(),
            f"it {_NO_SCHEDULE}",
        ),
        "optimizer.warmup_steps": {
            "<float>": "set optimizer.warmup_fraction, for a share of the steps"
        },
        "data.truncation": {
            "keep_end": "it is not supported: a prompt is not cut off; use keep_start or drop",
            "left": "it is not supported: a prompt is not cut off; use keep_start or drop",
            "right": "use keep_start",
            "true": "use keep_start",
            "<bool>": "set data.max_length to null for no truncation",
        },
        "data.eval_fraction": dict.fromkeys(("0", "0.0"), "leave it out")
        | {"1": "it should be less than 1", "<int>": "set data.eval_pairs, for a number of pairs"},
        "data.eval_pairs": {
            "0": "leave it out",
            "<float>": "set data.eval_fraction, for a share of the pairs",
        },
        "model.dtype": {
            "bfloat16": "use bf16",
            "torch.bfloat16": "use bf16",
            "bf16-mixed": "use bf16",
            "auto": "use bf16 or fp32: computation does not follow the checkpoint's dtype",
            "16": "training in fp16 is refused: use bf16 or fp32",
            "32": "use fp32",
        }
        | dict.fromkeys(("float32", "torch.float32", "float"), "use fp32")
        | dict.fromkeys(
            ("float16", "torch.float16", "half", "16-mixed"),
            "training in fp16 is refused: use bf16 or fp32",
        ),
        "lora.targets": dict.fromkeys(("all", "all_linear", "linear"), "use all-linear")
        | {
            "linear_qkv": "use [q_proj, k_proj, v_proj], each with its adapter",
            "linear_proj": "use [o_proj]",
            "linear_fc1": "use [gate_proj, up_proj], each with its adapter",
            "linear_fc2": "use [down_proj]",
        }
        | dict.fromkeys(
            ("qkv_proj", "query_key_value", "attention_qkv", "c_attn"),
            "use [q_proj, k_proj, v_proj], each with its adapter",
        )
        | dict.fromkeys(("gate_up_proj",), "use [gate_proj, up_proj], each with its adapter")
        | dict.fromkeys(
            ("lm_head", "embed_tokens", "output_layer", "word_embeddings"),
            "adapters of the embedding and the head are not supported",
        ),
        "training.epochs": {"<float>": "write a whole number; training.max_steps ends a run early"},
        "training.max_steps": {"-1": "write null: the epochs decide", "0": "write null"},
        "training.recompute": {"true": "use full", "false": "use off", "block": "use full"},
        "training.eval_every_steps": _EVERY_STEPS,
        "checkpoint.every_steps": _EVERY_STEPS,
        "checkpoint.resume": {
            "true": "use auto",
            "false": "use never, which is an error if there is a checkpoint",
            "<str>": "use auto, which resumes from the newest checkpoint in training.output",
        },
        "checkpoint.keep_best": {"true": "write how many to keep", "false": "use 0"},
        "logging.wandb": {
            "false": "write null",
            "<bool>": "write {project: NAME}",
            "<str>": "write {project: VALUE}",
        },
        "export.push_to_hub": {"<bool>": "write organization/name, or null for no upload"},
        "sdpo.steps": {"<int>": "write a list with one mapping per step: [{}, {}]"},
        # A section as one value
        "model": {"<str>": "set model.path"},
        "data": {"<str>": "set data.train"},
        "objective": {"<str>": "set objective.loss"},
        "optimizer": {"<str>": "the optimizer is AdamW: set optimizer.lr"},
        "lora": {
            "<bool>": "write {} for the defaults, or null to train all weights",
            "<str>": "set lora.adapter, if it is an adapter to start from",
        },
        "reference": {"<str>": "set reference.source; the model is model.path"},
        "checkpoint": {"<str>": "set model.path to start from it; a run resumes its own"},
        "logging": {"<str>": "set logging.tensorboard or logging.wandb"},
        "judge": {"<str>": "set judge.model"},
    }
)
"""A remedy by `section.field`, then by the value in lower case or by its type, as `<float>`."""
