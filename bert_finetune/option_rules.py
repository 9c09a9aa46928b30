"""What this project asks of `TrainingArguments`' options beyond what transformers checks: limits, and which options are
refused, and why. docs/options.md has these rules in a table, written by tests/options_table.py.

Nothing here imports torch before a rule needs it.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any

from bert_finetune.errors import InputError

if TYPE_CHECKING:
    from bert_finetune.run_arguments import RunArguments


@dataclass(frozen=True)
class Rule:
    """`says` ends the line of an error and of the table. `fits(value, args)`: whether the option's value, which is not
    its default, is kept among all the others of `args`."""

    says: str
    fits: Callable[[Any, "RunArguments"], bool]


def _nothing(value, args) -> bool:
    return False


def _refused(says: str) -> tuple[Rule]:
    """What an option that is refused altogether has."""
    return (Rule(says, _nothing),)


def _noted(says: str) -> Rule:
    """What the table says of an option and nothing asks for."""
    return Rule(says, lambda value, args: True)


def has_gpu(args: "RunArguments") -> bool:
    """Whether a run computes on a GPU."""
    import torch

    return not args.use_cpu and torch.accelerator.is_available()


def _as_object(value) -> dict | None:
    try:
        read = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return None
    return read if isinstance(read, dict) else None


def _is_installed(value, args) -> bool:
    from transformers.integrations import get_available_reporting_integrations

    return value in ("none", "all", *get_available_reporting_integrations())


def _are_optim_args(value, args) -> bool:
    known = OPTIMIZERS[args.optim]
    pairs = [pair.partition("=") for pair in value.replace(" ", "").split(",")]
    return all(
        name in known and (given in ("true", "false") if name in ("nesterov", "centered") else given)
        for name, _, given in pairs
    )


# Those that need no further package, and what of --optim_args they know and no other option says.
OPTIMIZERS = {
    "adamw_torch": (),
    "adamw_torch_fused": (),
    "adafactor": (),
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
}
_NO_WARMUP = ("constant", "reduce_lr_on_plateau")

_ABOVE_0 = Rule("must be above 0", lambda value, args: 0 < value < inf)
_FROM_0 = Rule("must be 0 or more", lambda value, args: 0 <= value < inf)
_FROM_1 = Rule("must be at least 1", lambda value, args: value >= 1)
_BELOW_1 = Rule("must be from 0 to below 1", lambda value, args: 0 <= value < 1)
_SEED = Rule("must be from 0 to 4294967295", lambda value, args: 0 <= value < 2**32)
_STEPS = Rule(
    "must be a whole number of steps, or a share of all steps between 0 and 1",
    lambda value, args: 0 < value < inf and (value < 1 or value == int(value)),
)
_ADAMW = Rule(
    "has an effect with --optim adamw_... only", lambda value, args: args.optim in ("adamw_torch", "adamw_torch_fused")
)
_WORKERS = Rule("needs --dataloader_num_workers of 1 or more", lambda value, args: args.dataloader_num_workers > 0)
_PUSHED = Rule("needs --push_to_hub", lambda value, args: args.push_to_hub)
_TRACKIO = Rule("needs --report_to trackio", lambda value, args: args.report_to in ("trackio", "all"))
_PROCESSES = _noted("for several processes")
NOT_IN_DISTILLATION = _noted("not in distillation")
_NO_SHARDING = "is not supported: on several GPUs each has whole models, by torchrun or accelerate launch without it"
_SAME_FIGURES = "the figures of a task need the answers for all rows of a dev set, kept and joined in one way"

RULES: dict[str, tuple[Rule, ...]] = {
    "per_device_train_batch_size": (_FROM_1,),
    "num_train_epochs": (_FROM_0,),
    "max_steps": (Rule("must be at least 1, or -1 for what --num_train_epochs gives", lambda v, args: v >= 1),),
    "learning_rate": (_FROM_0,),
    "lr_scheduler_type": (
        Rule("must not be greedy, whose lowest rate is far above a BERT's", lambda value, args: value != "greedy"),
        Rule(
            'must come with --lr_scheduler_kwargs {"mode": "max"} ("min" for a loss) where it is reduce_lr_on_plateau',
            lambda value, args: (
                value != "reduce_lr_on_plateau" or "mode" in (_as_object(args.lr_scheduler_kwargs) or ())
            ),
        ),
    ),
    "lr_scheduler_kwargs": (
        Rule('must be a JSON object, such as {"num_cycles": 2}', lambda value, args: _as_object(value) is not None),
        Rule(
            "has no effect with --lr_scheduler_type constant and constant_with_warmup",
            lambda value, args: args.lr_scheduler_type not in ("constant", "constant_with_warmup"),
        ),
    ),
    "warmup_steps": (
        Rule(
            "must be a whole number of steps, or a share of all steps from 0 to below 1",
            lambda value, args: 0 <= value < inf and (value < 1 or value == int(value)),
        ),
        Rule(
            f"has no effect with --lr_scheduler_type {' and '.join(_NO_WARMUP)}: these begin with --learning_rate",
            lambda value, args: value == 0 or args.lr_scheduler_type not in _NO_WARMUP,
        ),
    ),
    "optim": (Rule(f"must be one of {', '.join(OPTIMIZERS)}", lambda value, args: value in OPTIMIZERS),),
    "optim_args": (
        Rule(
            "must be name=value,name=value; there are "
            + ", ".join(f"{', '.join(names)} ({optim})" for optim, names in OPTIMIZERS.items() if names),
            _are_optim_args,
        ),
    ),
    "weight_decay": (_FROM_0,),
    "adam_beta1": (_BELOW_1, _ADAMW),
    "adam_beta2": (_BELOW_1, _ADAMW),
    "adam_epsilon": (_FROM_0, _ADAMW),
    "optim_target_modules": _refused("is for GaLore and APOLLO, which are not supported"),
    "gradient_accumulation_steps": (_FROM_1,),
    "average_tokens_across_devices": _refused("has no effect: losses are means over rows, not tokens"),
    "max_grad_norm": (Rule("must be 0, for no clipping, or more", _FROM_0.fits),),
    "label_smoothing_factor": (_BELOW_1, _noted("only where a text has one class"), NOT_IN_DISTILLATION),
    "fp16": (Rule("needs a GPU; leave it out, or use --bf16", lambda value, args: has_gpu(args)),),
    "bf16_full_eval": _refused("would leave the saved model's weights in bfloat16; use --bf16"),
    "fp16_full_eval": _refused("would leave the saved model's weights in float16; use --bf16 or --fp16"),
    "tf32": (_noted("True needs a GPU"),),
    "activation_checkpointing": (NOT_IN_DISTILLATION,),
    "activation_checkpointing_kwargs": _refused("is not supported; transformers' own are used"),
    "gradient_checkpointing": (_noted("the old name of --activation_checkpointing"),),
    "gradient_checkpointing_kwargs": _refused("is not supported; transformers' own are used"),
    "torch_compile": (_noted("models gain nothing by it on a CPU, and stay as they are"),),
    "torch_compile_backend": (Rule("must be inductor or eager", lambda v, args: v in ("inductor", "eager")),),
    "torch_compile_mode": _refused(
        "is not supported: with CUDA graphs a model's next answers would overwrite those that are kept"
    ),
    "use_liger_kernel": _refused("has no effect: there is no such kernel for classifiers"),
    "liger_kernel_config": _refused("has no effect: there is no such kernel for classifiers"),
    "use_cache": _refused("has no effect: a classifier generates no text"),
    "neftune_noise_alpha": (_ABOVE_0, NOT_IN_DISTILLATION),
    "torch_empty_cache_steps": (_FROM_1,),
    "auto_find_batch_size": _refused(
        "would go on from half-trained weights with another batch size; give a smaller --train_batch_size"
    ),
    "logging_steps": (_STEPS,),
    "log_on_each_node": _refused("has no effect: several machines are not supported"),
    "logging_nan_inf_filter": _refused("has no effect: a loss that is not finite ends the run"),
    "include_num_input_tokens_seen": (_noted("True: all tokens, padding too"),),
    "report_to": (
        Rule("must be tensorboard, none, all, or a logger of transformers whose package is installed", _is_installed),
    ),
    "run_name": (
        Rule(
            "has no effect with --report_to tensorboard and none",
            lambda value, args: args.report_to not in ("tensorboard", "none"),
        ),
    ),
    "project": (_TRACKIO,),
    "trackio_space_id": (_TRACKIO,),
    "trackio_bucket_id": (_TRACKIO,),
    "trackio_static_space_id": (_TRACKIO,),
    "eval_steps": (_STEPS,),
    "eval_delay": (_FROM_0,),
    "per_device_eval_batch_size": (_FROM_1,),
    "prediction_loss_only": _refused(f"is not supported: {_SAME_FIGURES}"),
    "eval_do_concat_batches": _refused(f"is not supported: {_SAME_FIGURES}"),
    "eval_use_gather_object": _refused("has no effect: answers are plain tensors"),
    "eval_accumulation_steps": (_FROM_1,),
    "include_for_metrics": _refused("has no effect: figures are of answers and labels alone"),
    "batch_eval_metrics": _refused(f"is not supported: {_SAME_FIGURES}"),
    "save_strategy": (
        Rule("best needs evaluations", lambda value, args: value != "best" or args.eval_strategy != "no"),
    ),
    "save_steps": (_STEPS,),
    "save_on_each_node": _refused("is not supported: several machines are not"),
    "save_total_limit": (Rule("must be at least 1; a large number keeps all", _FROM_1.fits),),
    "enable_jit_checkpoint": _refused(
        "would write a stopped run as a finished one; --resume_from_checkpoint goes on without it"
    ),
    "push_to_hub": (Rule("under which name? Give --hub_model_id", lambda value, args: bool(args.hub_model_id)),),
    "hub_token": _refused("the command is kept beside the model, for all to read; set HF_TOKEN instead"),
    "hub_private_repo": (_PUSHED,),
    "hub_model_id": (_PUSHED,),
    "hub_strategy": _refused("only the finished folder is sent; leave it out"),
    "hub_always_push": _refused("has no effect: only the finished folder is sent"),
    "hub_revision": (_PUSHED,),
    "greater_is_better": _refused("has no effect: it follows from --metric_for_best_model"),
    "ignore_data_skip": _refused("would make a resumed run another one than the uninterrupted"),
    "restore_callback_states_from_checkpoint": _refused("has no effect: there are no such states"),
    "seed": (_SEED,),
    "data_seed": (_SEED,),
    "accelerator_config": _refused("is not supported: batches are dealt out in this project's own way"),
    "parallelism_config": _refused(_NO_SHARDING),
    "dataloader_num_workers": (_FROM_0,),
    "dataloader_pin_memory": (_noted("no effect on a CPU"),),
    "dataloader_persistent_workers": (_WORKERS,),
    "dataloader_prefetch_factor": (_FROM_1, _WORKERS),
    "dataloader_multiprocessing_context": _refused("is not supported: workers start as Python starts them"),
    "dataloader_in_order": _refused("would leave the order of batches to chance"),
    "remove_unused_columns": _refused("has no use: the datasets hold nothing but what is read"),
    "label_names": _refused("has no effect: set by the project"),
    "train_sampling_strategy": (
        Rule(
            "must be group_by_length, random, sequential or batch_rebalance",
            lambda value, args: value in ("random", "sequential", "batch_rebalance"),
        ),
    ),
    "length_column_name": _refused("has no effect: lengths are counted"),
    "ddp_find_unused_parameters": (_PROCESSES,),
    "ddp_bucket_cap_mb": (_FROM_1, _PROCESSES),
    "ddp_broadcast_buffers": (_PROCESSES,),
    "ddp_static_graph": _refused("is not supported: a mapping's graph may change from step to step"),
    "ddp_backend": (
        Rule(
            "must be gloo, or nccl on GPUs",
            lambda value, args: value == "gloo" or (value == "nccl" and has_gpu(args)),
        ),
        Rule("needs several processes", lambda value, args: int(os.environ.get("WORLD_SIZE", 1)) > 1),
    ),
    "ddp_timeout": (_FROM_1, _PROCESSES),
    "fsdp": _refused(_NO_SHARDING),
    "fsdp_config": _refused(_NO_SHARDING),
    "deepspeed": _refused(_NO_SHARDING),
    "debug": _refused("is not supported; a loss that is not finite ends the run anyway"),
    "skip_memory_metrics": _refused("is not supported: memory would be counted among the dev figures"),
    "local_rank": (_noted("for old launchers; not used"),),
}

# What `accelerate launch` is told and hands on as ACCELERATE_USE_..., and is more than data parallel.
_SHARDING = ("fsdp", "deepspeed", "megatron_lm", "parallelism_config")

# By the name that the scripts' documents use.
_SHOWN = {"per_device_train_batch_size": "train_batch_size", "per_device_eval_batch_size": "eval_batch_size"}


def is_refused(option: str) -> bool:
    """Whether no value of an option is taken but its default."""
    return any(rule.fits is _nothing for rule in RULES.get(option, ()))


def check_options(args: "RunArguments") -> None:
    """Raise InputError for the first option that is not its default and breaks a rule."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if value is None or value == default_of(field):
            continue
        for rule in RULES.get(field.name, ()):
            if not rule.fits(value, args):
                raise InputError(f"{_as_given(field.name, value)}: {rule.says}")
    check_launcher(args)


def default_of(field: dataclasses.Field):
    """The default of a dataclass' field."""
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def _as_given(name: str, value) -> str:
    option = f"--{_SHOWN.get(name, name)}"
    if value is True or name == "hub_token":
        return option
    if isinstance(value, list):
        value = " ".join(str(getattr(one, "value", one)) for one in value)
    return f"{option} {value}"


def check_launcher(args: "RunArguments") -> None:
    """Raise InputError where `accelerate launch`, or the file of its answers, asks for more than data parallel."""
    for name in _SHARDING:
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true":
            raise InputError(f"accelerate launch --use_{name}: {_NO_SHARDING}")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    asked = "fp16" if args.fp16 else "bf16" if args.bf16 else "no"
    if precision not in ("no", asked):
        raise InputError(f"accelerate launch --mixed_precision {precision}: is not heard here; give --bf16 or --fp16")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        raise InputError(f"accelerate launch --dynamo_backend {backend}: is not heard here; give --torch_compile")


def check_optimizer(args: "RunArguments") -> None:
    """Make the optimiser and the schedule of a single weight, and look ten steps ahead. Raises InputError for options
    that these do not take.

    args: as `TrainingArguments` leaves them.
    """
    import torch
    from transformers import Trainer, get_scheduler

    weight = torch.nn.Parameter(torch.zeros(1))
    try:
        make, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = make([weight], **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"--optim_args {args.optim_args}: {error}") from error
    try:
        schedule = get_scheduler(
            args.lr_scheduler_type, optimizer, args.get_warmup_steps(10), 10, args.lr_scheduler_kwargs
        )
        for _ in range(10 if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR) else 0):
            optimizer.step()
            schedule.step()
    except (TypeError, ValueError, ArithmeticError) as error:
        given = json.dumps(args.lr_scheduler_kwargs or {})
        raise InputError(
            f"--lr_scheduler_type {args.lr_scheduler_type.value} with --lr_scheduler_kwargs {given}: {error}"
        ) from error
