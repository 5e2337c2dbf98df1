"""Intermediate DPO in Megatron-LM's own training loop, with Megatron-LM's own arguments.

    torchrun --nproc-per-node 8 examples/plugin/megatron_lm_pretrain.py \\
        --pairs pairs.jsonl --reference-cache runs/reference --tap-layers 22 \\
        --load model --finetune --tokenizer-type HuggingFaceTokenizer --tokenizer-model model/hf \\
        --micro-batch-size 4 --global-batch-size 64 ...

A sample is one answer with its prompt, so this is 2 pairs in a micro-batch and 32 in a step. The
lines that end with `#` are the plugin's. README.md in this folder explains data and reference.
"""

from pathlib import Path

from megatron.core.enums import ModelType
from megatron.training import get_tokenizer, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from megatron_idpo import Objective  #
from megatron_idpo.config.data import SourceConfig  #
from megatron_idpo.data.tokenize.dataset import load_pairs  #
from megatron_idpo.data.tokenize.tokenizers import load_tokenizer  #
from megatron_idpo.megatron_lm.pretrain import PretrainDpo  #


def add_arguments(parser):
    """Arguments in addition to Megatron-LM's."""
    group = parser.add_argument_group("intermediate DPO")
    group.add_argument("--pairs", required=True)
    group.add_argument("--eval-pairs")
    group.add_argument("--reference-cache", required=True, type=Path)
    group.add_argument("--tap-layers", nargs="*", type=int, default=[])
    group.add_argument("--beta", type=float, default=0.1)
    group.add_argument("--intermediate-weight", type=float, default=0.1)
    return parser


def main():
    """Train."""
    args = parse_and_validate_args(add_arguments, args_defaults={"dataloader_type": "external"})
    tokenizer = load_tokenizer(args.tokenizer_model)
    pairs = {
        path: load_pairs([SourceConfig(path=path)], tokenizer)
        for path in filter(None, (args.pairs, args.eval_pairs))
    }
    dpo = PretrainDpo(  #
        args,  #
        pairs=pairs[args.pairs],  #
        eval_pairs=pairs.get(args.eval_pairs),  #
        layers=args.tap_layers,  #
        objective=Objective(beta=args.beta, intermediate_weight=args.intermediate_weight),  #
        vocab_size=get_tokenizer().vocab_size,  #
        cache=args.reference_cache,  #
    )  #
    model_config = gpt_config_from_args(args)
    model_config.pre_wrap_hooks.append(dpo.pre_wrap_hook)  #
    pretrain(
        pretrain_cfg_container_from_args(args, model_config),
        dpo.data_provider,
        ModelType.encoder_or_decoder,
        dpo.forward_step,
        process_non_loss_data_func=dpo.write_evaluation,
        non_loss_data_func=dpo.report_evaluation,
    )


if __name__ == "__main__":
    main()
