"""Each of transformers' options works here, or is refused by name before anything is read; the page says which."""

import dataclasses
import json
import shlex

import numpy as np
import pytest
import torch
import transformers
import warm
from conftest import ROOT
from options_table import PAGE, page_with_table
from safetensors.numpy import load_file

from bert_emd.emd_task_distill import main as distil
from bert_finetune.arguments import ModelArguments, TaskArguments
from bert_finetune.command_line import Parser
from bert_finetune.errors import InputError
from bert_finetune.option_rules import OPTIMIZERS, RULES, check_launcher, is_refused
from bert_finetune.run_arguments import RunArguments
from bert_finetune.run_glue import main as finetune
from bert_finetune.trainer_options import trainer_options

# Nothing of these is there to be read.
NOWHERE = "--model_name_or_path nowhere --task_name RTE --data_dir nowhere --output_dir nowhere --do_train"
NEWEST = transformers.__version__ == "5.23.0"
newest = pytest.mark.skipif(not NEWEST, reason="the rules are for transformers 5.23.0; others may lack an option")

NO_SHARDING = "is not supported: on several GPUs each has whole models, by torchrun or accelerate launch without it"
FIGURES = "is not supported: the figures of a task need the answers for all rows"
STEPS = "must be a whole number of steps, or a share of all steps"

# What is given -> how the line begins that refuses it; "..." at its beginning is what is given.
REFUSED = {
    "--optim_target_modules all-linear": "...: is for GaLore and APOLLO",
    "--average_tokens_across_devices False": "...: has no effect",
    "--bf16_full_eval": "...: would leave the saved model's weights in bfloat16",
    "--fp16_full_eval": "...: would leave the saved model's weights in float16",
    """--activation_checkpointing_kwargs '{"use_reentrant": false}'""": "--activation_checkpointing_kwargs {",
    """--gradient_checkpointing_kwargs '{"use_reentrant": false}'""": "--gradient_checkpointing_kwargs {",
    "--torch_compile_mode nonsense": "...: is not supported",
    "--use_liger_kernel": "...: has no effect",
    "--liger_kernel_config {}": "argument --liger_kernel_config/--liger-kernel-config: invalid",
    "--use_cache": "...: has no effect",
    "--auto_find_batch_size": "...: would go on from half-trained weights",
    "--log_on_each_node False": "...: has no effect",
    "--logging_nan_inf_filter": "...: has no effect",
    "--prediction_loss_only": f"...: {FIGURES}",
    "--eval_do_concat_batches False": f"...: {FIGURES}",
    "--no_eval_do_concat_batches": f"--eval_do_concat_batches False: {FIGURES}",
    "--batch_eval_metrics": f"...: {FIGURES}",
    "--eval_use_gather_object": "...: has no effect",
    "--include_for_metrics inputs loss": "...: has no effect",
    "--save_on_each_node": "...: is not supported",
    "--enable_jit_checkpoint": "...: would write a stopped run as a finished one",
    "--hub_token secret": "--hub_token: the command is kept beside the model",
    "--hub_strategy every_save": "...: only the finished folder is sent",
    "--hub_always_push": "...: has no effect",
    "--greater_is_better False": "...: has no effect",
    "--ignore_data_skip": "...: would make a resumed run another one",
    "--restore_callback_states_from_checkpoint": "...: has no effect",
    "--accelerator_config foo": "...: is not supported",
    "--parallelism_config foo": "argument --parallelism_config/--parallelism-config: invalid",
    "--dataloader_multiprocessing_context spawn": "...: is not supported",
    "--dataloader_in_order False": "...: would leave the order of batches to chance",
    "--remove_unused_columns": "...: has no use",
    "--label_names labels": "...: has no effect",
    "--length_column_name size": "...: has no effect",
    "--ddp_static_graph True": "--ddp_static_graph: is not supported",
    "--fsdp": f"...: {NO_SHARDING}",
    "--fsdp full_shard": f"...: {NO_SHARDING}",
    "--fsdp_config fsdp.json": f"...: {NO_SHARDING}",
    "--deepspeed ds.json": f"...: {NO_SHARDING}",
    "--debug underflow_overflow": "...: is not supported",
    "--skip_memory_metrics False": "...: is not supported",
    # Values.
    "--train_batch_size 0": "...: must be at least 1",
    "--eval_batch_size 0": "...: must be at least 1",
    "--num_train_epochs -1": "--num_train_epochs -1.0: must be 0 or more",
    "--num_train_epochs inf": "...: must be 0 or more",
    "--max_steps 0": "...: must be at least 1, or -1",
    "--max_steps -2": "...: must be at least 1, or -1",
    "--learning_rate -1": "--learning_rate -1.0: must be 0 or more",
    "--learning_rate nan": "...: must be 0 or more",
    "--schedule wavy": "wavy is not a valid SchedulerType",
    "--lr_scheduler_type greedy": "...: must not be greedy",
    "--lr_scheduler_type reduce_lr_on_plateau": "...: must come with --lr_scheduler_kwargs",
    "--lr_scheduler_type cosine_with_min_lr": "... with --lr_scheduler_kwargs {}: One of min_lr or",
    "--lr_scheduler_type cosine_warmup_with_min_lr": "... with --lr_scheduler_kwargs {}: One of min_lr or",
    "--lr_scheduler_type warmup_stable_decay": "... with --lr_scheduler_kwargs {}: get_wsd_schedule() missing 1",
    "--lr_scheduler_type polynomial --learning_rate 0": "--lr_scheduler_type polynomial with --lr_scheduler_kwargs {}",
    "--lr_scheduler_kwargs foo": "...: must be a JSON object",
    "--lr_scheduler_kwargs {foo": "...: must be a JSON object",
    "--lr_scheduler_kwargs [1]": "...: must be a JSON object",
    """--lr_scheduler_kwargs '{"foo": 1}'""": "--lr_scheduler_type linear with --lr_scheduler_kwargs {",
    """--schedule polynomial --lr_scheduler_kwargs '{"power": "x"}'""": "--lr_scheduler_type polynomial with",
    """--schedule constant --lr_scheduler_kwargs '{"a": 1}'""": """--lr_scheduler_kwargs {"a": 1}: has no effect""",
    "--warmup_steps -1": "--warmup_steps -1.0: must be a whole number of steps, or a share",
    "--warmup_steps 1.5": "...: must be a whole number of steps, or a share",
    "--warmup_steps 5 --schedule constant": "--warmup_steps 5.0: has no effect",
    "--optim adamw_bnb_8bit": "argument --optim: invalid choice: 'adamw_bnb_8bit' (choose from",
    "--optim lomo": "argument --optim: invalid choice",
    "--optim nonsense": "argument --optim: invalid choice",
    "--optim_args foo": "...: must be name=value",
    "--optim_args momentum=0.9": "...: must be name=value",
    "--optim sgd --optim_args momentum": "--optim_args momentum: must be name=value",
    "--optim sgd --optim_args lr=0.1": "--optim_args lr=0.1: must be name=value",
    "--optim sgd --optim_args momentum=-1": "--optim_args momentum=-1: Invalid momentum",
    "--optim sgd --optim_args momentum=x": "--optim_args momentum=x: could not convert",
    "--optim sgd --optim_args nesterov=maybe": "--optim_args nesterov=maybe: must be name=value",
    "--weight_decay -1": "--weight_decay -1.0: must be 0 or more",
    "--adam_beta1 2": "--adam_beta1 2.0: must be from 0 to below 1",
    "--adam_beta2 1": "--adam_beta2 1.0: must be from 0 to below 1",
    "--adam_epsilon -1": "--adam_epsilon -1.0: must be 0 or more",
    "--optim sgd --adam_beta1 0.5": "--adam_beta1 0.5: has an effect with --optim adamw_... only",
    "--gradient_accumulation_steps 0": "...: must be at least 1",
    "--max_grad_norm -1": "--max_grad_norm -1.0: must be 0",
    "--label_smoothing_factor 1": "--label_smoothing_factor 1.0: must be from 0 to below 1",
    "--fp16 --no_cuda": "--fp16: needs a GPU",
    "--tf32 True --no_cuda": "--tf32 requires",
    "--torch_compile_backend nonsense": "...: must be inductor or eager",
    "--neftune_noise_alpha -1": "--neftune_noise_alpha -1.0: must be above 0",
    "--torch_empty_cache_steps 0": "...: must be at least 1",
    "--logging_steps 0": f"--logging_steps 0.0: {STEPS}",
    "--logging_strategy sometimes": "argument --logging_strategy/--logging-strategy: invalid choice",
    "--log_level nonsense": "argument --log_level/--log-level: invalid choice",
    "--report_to wandb": "...: must be tensorboard, none, all, or",
    "--report_to mlflow": "...: must be tensorboard, none, all, or",
    "--report_to nonsense": "...: must be tensorboard, none, all, or",
    "--run_name x": "...: has no effect",
    "--project x": "...: needs --report_to trackio",
    "--trackio_space_id x": "...: needs --report_to trackio",
    "--trackio_bucket_id x": "...: needs --report_to trackio",
    "--trackio_static_space_id x": "...: needs --report_to trackio",
    "--eval_steps 0": f"--eval_steps 0.0: {STEPS}",
    "--eval_steps -5": f"--eval_steps -5.0: {STEPS}",
    "--save_steps 2.5": f"...: {STEPS}",
    "--eval_delay -1": "--eval_delay -1.0: must be 0 or more",
    "--eval_accumulation_steps 0": "...: must be at least 1",
    "--save_strategy best --eval_strategy no": "--save_strategy best: best needs evaluations",
    "--save_total_limit 0": "...: must be at least 1",
    "--push_to_hub": "...: under which name? Give --hub_model_id",
    "--hub_model_id me/small": "...: needs --push_to_hub",
    "--hub_private_repo True": "--hub_private_repo: needs --push_to_hub",
    "--hub_revision main": "...: needs --push_to_hub",
    "--seed -1": "...: must be from 0 to",
    "--data_seed -1": "...: must be from 0 to",
    "--dataloader_num_workers -1": "...: must be 0 or more",
    "--dataloader_persistent_workers": "...: needs --dataloader_num_workers",
    "--dataloader_prefetch_factor 2": "...: needs --dataloader_num_workers",
    "--dataloader_prefetch_factor 0 --dataloader_num_workers 1": "--dataloader_prefetch_factor 0: must be at least 1",
    "--train_sampling_strategy nonsense": "...: must be group_by_length, random,",
    "--ddp_backend nonsense": "argument --ddp_backend/--ddp-backend: invalid choice",
    "--ddp_backend mpi": "...: must be gloo, or nccl",
    "--ddp_backend nccl --no_cuda": "--ddp_backend nccl: must be gloo, or nccl",
    "--ddp_backend gloo": "...: needs several processes",
    "--ddp_bucket_cap_mb 0": "...: must be at least 1",
    "--ddp_timeout 0": "...: must be at least 1",
}

# Each in two steps of a fine-tuning; the options of a line do not meddle with each other.
TRIED = {
    "start": "--eval_on_start --logging_first_step True --include_num_input_tokens_seen True --data_seed 3 "
    "--log_level error --log_level_replica error --torch_empty_cache_steps 1 --disable_tqdm True --report_to all",
    "same": "--dataloader_num_workers 1 --dataloader_prefetch_factor 3 --dataloader_persistent_workers True "
    "--dataloader_pin_memory False --eval_accumulation_steps 1 --tf32 False --local_rank 0 --logging_strategy epoch "
    "--ddp_find_unused_parameters True --ddp_bucket_cap_mb 1 --ddp_broadcast_buffers True --ddp_timeout 60 "
    "--activation_checkpointing True",
    "other": "--label_smoothing_factor 0.5 --neftune_noise_alpha 5 --gradient_checkpointing",
    "sequential": "--train_sampling_strategy sequential --save_strategy best --save_only_model --logging_strategy no",
    "rebalanced": "--train_sampling_strategy batch_rebalance --eval_strategy epoch --eval_delay 9",
    "not the best": "--load_best_model_at_end False --train_sampling_strategy random --save_strategy epoch",
    "no evaluation": "--eval_strategy no --optim adamw_torch --schedule constant",
    "adamw": "--adam_beta1 0.5 --adam_beta2 0.9 --adam_epsilon 1e-3 --weight_decay 0.1 --schedule warmup_stable_decay "
    """--lr_scheduler_kwargs '{"num_decay_steps": 1}'""",
    "adafactor": """--optim adafactor --schedule reduce_lr_on_plateau --lr_scheduler_kwargs '{"mode": "max"}'""",
    "sgd": "--optim sgd --optim_args momentum=0.9,nesterov=true --schedule polynomial "
    """--lr_scheduler_kwargs '{"power": 2}'""",
    "adagrad": """--optim adagrad --optim_args lr_decay=0.1,eps=1e-3 --schedule cosine_with_min_lr """
    """--lr_scheduler_kwargs '{"min_lr": 1e-6}'""",
    "rmsprop": "--optim rmsprop --optim_args momentum=0.9,alpha=0.9,centered=true --schedule inverse_sqrt",
}
SCHEDULES = """
    linear constant constant_with_warmup cosine cosine_with_restarts polynomial inverse_sqrt warmup_stable_decay
    cosine_with_min_lr cosine_warmup_with_min_lr reduce_lr_on_plateau
""".split()
# Where other options are used in a run, by the words that tests write them with.
ELSEWHERE = {
    "test_run_glue": "per_gpu_train_batch_size learning_rate num_train_epochs save_steps output_dir no_cuda do_eval "
    "do_predict do_train seed",
    "test_resume": "gradient_accumulation_steps save_total_limit resume_from_checkpoint",
    "test_first_step": "max_grad_norm eval_step logging_steps warmup_steps",
    "test_emd_task_distill": "bf16 torch_compile torch_compile_backend dataloader_drop_last eval_batch_size max_steps",
    "test_custom_task": "metric_for_best_model",
    "test_hub": "push_to_hub hub_private_repo hub_model_id hub_revision",
    "test_two_processes": "ddp_backend ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters",
    "test_trainer_options": "fp16 full_determinism run_name project trackio_space_id trackio_bucket_id "
    "trackio_static_space_id",
}


def given(options: str, name: str) -> bool:
    return f"--{name}" in shlex.split(options)


def parse(options: str) -> RunArguments:
    words = shlex.split(f"{NOWHERE} {options}")
    return Parser(ModelArguments, TaskArguments, description="").parse(words)[-1]


@pytest.mark.parametrize("options", REFUSED)
def test_refused(options):
    begins = REFUSED[options]
    begins = options + begins.removeprefix("...") if begins.startswith("...") else begins
    with pytest.raises(InputError) as refused:
        parse(options)
    assert str(refused.value).startswith(begins)
    assert "secret" not in str(refused.value) and "\n" not in str(refused.value)


def test_nothing_is_read_before(teacher, small_student, exits_with_2):
    """There are no data, and for a fine-tuning no model; a distillation has looked at the student's configuration."""
    option = "--deepspeed", "ds.json"
    assert f"error: --deepspeed ds.json: {NO_SHARDING}" in exits_with_2(finetune, *NOWHERE.split(), *option)
    models = "--teacher_model", teacher, "--student_model", small_student
    words = "--task_name RTE --data_dir nowhere --output_dir nowhere".split()
    assert f"error: --deepspeed ds.json: {NO_SHARDING}" in exits_with_2(distil, *models, *words, *option)


@pytest.mark.parametrize("name", ["fsdp", "deepspeed", "megatron_lm", "parallelism_config"])
def test_what_accelerate_launch_asks_for(name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(InputError, match=f"accelerate launch --use_{name}: {NO_SHARDING}"):
        parse("")


def test_precision_and_compiling_of_accelerate_launch(monkeypatch):
    args = parse("--no_cuda")
    for precision in ("bf16", "fp16", "fp8"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        with pytest.raises(InputError, match=f"accelerate launch --mixed_precision {precision}: is not heard here"):
            check_launcher(args)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert parse("--bf16 --no_cuda").bf16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    for backend in ("no", "NO"):
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        check_launcher(args)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(InputError, match="accelerate launch --dynamo_backend inductor: is not heard here"):
        check_launcher(args)


def test_loggers_that_are_installed(monkeypatch):
    there = lambda: ["tensorboard", "trackio", "wandb"]  # noqa: E731
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", there)
    assert parse("--report_to wandb --run_name x").report_to == ["wandb"]
    options = "--project a --trackio_space_id b --trackio_bucket_id c --trackio_static_space_id d"
    assert parse(f"--report_to trackio {options}").trackio_bucket_id == "c"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule):
    needed = {
        "warmup_stable_decay": {"num_decay_steps": 2},
        "reduce_lr_on_plateau": {"mode": "min"},
        "cosine_with_min_lr": {"min_lr": 1e-6},
        "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    }
    more = f"--lr_scheduler_kwargs '{json.dumps(needed[schedule])}'" if schedule in needed else ""
    assert parse(f"--schedule {schedule} {more}").lr_scheduler_type == schedule


@newest
def test_every_option_is_tried_or_refused():
    names = {option.name for option in trainer_options()}
    fields = {field.name: field for field in dataclasses.fields(RunArguments)}
    assert RULES.keys() <= names
    aliases = {f.name: (f.name, *(f.metadata.get("aliases") or [])) for f in fields.values()}
    elsewhere = {name for words in ELSEWHERE.values() for name in words.split()}
    for name in names:
        spellings = {spelling.removeprefix("--") for spelling in aliases[name]}
        tried = spellings & elsewhere or any(given(options, s) for options in TRIED.values() for s in spellings)
        assert bool(tried) != is_refused(name), name
        if is_refused(name):
            assert any(given(options, s) for options in REFUSED for s in spellings), name
    for file, words in ELSEWHERE.items():
        text = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
        assert all(f"--{name}" in text for name in words.split()), file
    for optim in OPTIMIZERS:
        assert optim == RunArguments("nowhere").optim or any(f"--optim {optim}" in o for o in TRIED.values()), optim


@newest
def test_the_page_is_what_the_code_gives():
    page = PAGE.read_text(encoding="utf-8")
    assert page == page_with_table(page), "write it anew: python tests/options_table.py"


def command(pretrained, glue_dir, out, options):
    return [
        *("--model_name_or_path", str(pretrained), "--task_name", "RTE", "--data_dir", str(glue_dir), "--do_train"),
        *("--max_seq_length", "32", "--train_batch_size", "12", "--num_train_epochs", "1", "--learning_rate", "1e-2"),
        *("--logging_steps", "1", "--warmup_steps", "0", "--no_cuda", "--output_dir", str(out)),
        *shlex.split(options),
    ]


@pytest.fixture(scope="module")
def plain(pretrained, glue_dir, tmp_path_factory):
    """The weights of a run of two steps."""
    out = tmp_path_factory.mktemp("plain") / "out"
    finetune(command(pretrained, glue_dir, out, ""))
    return load_file(out / "model.safetensors")


def history(out):
    return json.loads((out / "eval_results.json").read_text())["history"]


@pytest.mark.training
@pytest.mark.parametrize("name", TRIED)
def test_tried(name, plain, pretrained, glue_dir, tmp_path, capsys):
    out = tmp_path / "out"
    finetune(command(pretrained, glue_dir, out, TRIED[name]))
    weights = load_file(out / "model.safetensors")
    same = all(np.allclose(weights[key], value, atol=1e-6) for key, value in plain.items())
    assert same == (name == "same")
    assert all(np.isfinite(value).all() for value in weights.values())
    steps = [entry["step"] for entry in history(out)]
    assert steps == {"start": [0, 2], "rebalanced": [], "no evaluation": []}.get(name, [2])
    checkpoint = next(out.glob("checkpoint-2"), out / "none")
    if name == "start":
        assert json.loads((checkpoint / "trainer_state.json").read_text())["num_input_tokens_seen"] > 0
        assert not any(line.startswith("{") for line in capsys.readouterr().out.splitlines())
    if name == "sequential":
        assert (checkpoint / "model.safetensors").exists() and not (checkpoint / "optimizer.pt").exists()


@pytest.mark.training
def test_full_determinism(pretrained, glue_dir, tmp_path):
    """In a process of its own, which it changes for good."""
    options = command(pretrained, glue_dir, tmp_path / "out", "--full_determinism")
    run = warm.start(ROOT / "bert_finetune/run_glue.py", *options)
    assert run.wait(timeout=300) == 0, run.communicate()[1]
    assert [entry["step"] for entry in history(tmp_path / "out")] == [2]


@pytest.mark.training
@pytest.mark.skipif(not torch.cuda.is_available(), reason="--fp16 needs a GPU")
def test_fp16(pretrained, glue_dir, tmp_path):
    words = command(pretrained, glue_dir, tmp_path / "out", "--fp16 --tf32 True")
    words.remove("--no_cuda")
    finetune(words)
    assert [entry["step"] for entry in history(tmp_path / "out")] == [2]


def test_scores_are_not_smoothed(pretrained, glue_dir, tmp_path, exits_with_2):
    words = command(pretrained, glue_dir, tmp_path / "out", "--task_name STS-B --label_smoothing_factor 0.1")
    assert "--label_smoothing_factor: smooths over classes of which a text has one" in exits_with_2(finetune, *words)
