"""Checks of Megatron-LM's arguments, and of those of `PretrainDpo`."""

from typing import Any

from megatron_idpo.errors import Problem


def check_arguments(
    args: Any, *, has_cache: bool, has_eval_pairs: bool, has_reference: bool, has_adapters: bool
) -> list[Problem]:
    """Arguments that do not fit.

    Args:
        args: Megatron-LM's, validated.
        has_cache: whether `PretrainDpo` was given a cache.
        has_eval_pairs: whether it was given pairs to evaluate.
        has_reference: whether it was given the reference's log-probabilities.
        has_adapters: whether it can switch adapters off.
    """
    checks = [
        (args.dataloader_type == "external", "--dataloader-type", "must be external"),
        (args.micro_batch_size % 2 == 0, "--micro-batch-size", "must be even: a pair is 2 samples"),
        (
            args.eval_micro_batch_size % 2 == 0 or not has_eval_pairs,
            "--eval-micro-batch-size",
            "must be even: a pair is 2 samples",
        ),
        (
            not getattr(args, "rampup_batch_size", None),
            "--rampup-batch-size",
            "would change the number of pairs that losses are averaged over; leave it out",
        ),
        (
            args.context_parallel_size == 1,
            "--context-parallel-size",
            "is not supported by this data provider; cut your own batches as attach describes",
        ),
        (
            not args.eval_iters or has_eval_pairs or args.full_validation,
            "--eval-iters",
            "needs eval_pairs; give them, or set --eval-iters 0",
        ),
        (
            not (args.use_megatron_fsdp or args.use_torch_fsdp2),
            "--use-megatron-fsdp, --use-torch-fsdp2",
            "are not supported by taps; use --use-distributed-optimizer",
        ),
        (not args.full_validation, "--full-validation", "is not supported; set --eval-iters"),
        (
            args.ckpt_format == "torch_dist" or not (args.load or args.save),
            "--ckpt-format",
            "must be torch_dist: it fills the head's copies on the tapped stages",
        ),
        (
            has_reference != (has_cache or has_adapters),
            "PretrainDpo",
            "give a cache directory, adapters_off, or the reference's log-probabilities",
        ),
        (
            not (has_reference and has_eval_pairs),
            "PretrainDpo.reference",
            "has no log-probabilities of eval_pairs; give a cache directory instead",
        ),
    ]
    return [Problem(location, message) for holds, location, message in checks if not holds]
