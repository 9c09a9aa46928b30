"""transformers' Trainer as every run has it, whatever it trains: checkpoints written whole, resumed, the best one kept;
a stop at NaN; what it says while it runs."""

import copy
import errno
import math
import time
from pathlib import Path
from typing import NoReturn

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from bert_finetune.checkpoints import restore_weights, save_weights
from bert_finetune.errors import InputError, reading, writing
from bert_finetune.files import remove
from bert_finetune.half_precision import keep_in_float32
from bert_finetune.outputs import forget_replaced_run
from bert_finetune.run_arguments import RunArguments
from bert_finetune.run_checkpoints import (
    begin,
    checkpoint_name,
    checkpoints,
    complete,
    keep,
    last_checkpoint,
    seconds_at,
)
from bert_finetune.samplers import share_batches
from bert_finetune.training_log import Means, QuietProgress, evaluation_line

# Devices on which compiled models gain nothing. On 2 CPU cores a forward pass of BERT-base (32 x 128) took 5.8 s
# compiled and 6.5 s as it is, a training step of a 4 x 312 student 1.9 and 1.5 s; both took a minute to compile.
_NOT_COMPILED = ("cpu",)


# What is used of transformers' private parts, for want of public ones: `_get_train_sampler` and `_get_eval_sampler`,
# to order the examples; `_save_checkpoint`, `_get_output_dir`, `_load_best_model`, `_load_from_checkpoint`,
# `_load_optimizer_and_scheduler` and `_load_rng_state`, to have checkpoints written whole, found, read, and named where
# they are damaged; `TrainingArguments._n_gpu`; `PreTrainedModel._supports_attention_backend`;
# `PreTrainedConfig._attn_implementation`.
class RunTrainer(Trainer):
    """A Trainer for one run.

    `args`: with `metric_for_best_model` and `greater_is_better` as the run chooses its best checkpoint. `experiment`:
    what the run is, for its checkpoints. The losses that a step computes go to the log and, as means since the last
    evaluation, into the evaluation's line.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: RunArguments,
        tokenizer: PreTrainedTokenizerBase,
        train_dataset: Dataset | None = None,
        experiment: dict | None = None,
        data_collator: DataCollatorWithPadding | None = None,
        **kwargs,
    ):
        args = copy.copy(args)
        # Checkpoints are written, found and removed by `bert_finetune.run_checkpoints`.
        self._folder, self._limit, args.save_total_limit = Path(args.output_dir), args.save_total_limit, None
        self._saving_into: Path | None = None
        self._experiment = experiment or {}
        self._begun = self._seconds = self._seconds_before = 0.0
        if train_dataset is None:
            args.report_to = []  # an evaluation by itself leaves no log
        args.push_to_hub = False  # done by the script, once all is finished
        args._n_gpu = min(args.n_gpu, 1)  # several GPUs: one process each, by torchrun or accelerate
        # Compiled by `prepare`, and not by accelerate anew for several lengths.
        self._compiler, args.torch_compile_backend = args.torch_compile_backend, None
        super().__init__(
            model,
            args,
            data_collator=data_collator or DataCollatorWithPadding(tokenizer),
            train_dataset=train_dataset,
            processing_class=tokenizer,
            **kwargs,
        )
        self.prepare(self.plain_model)
        self.model_accepts_loss_kwargs = False  # every loss here is a mean over its batch
        self._since_log, self._since_evaluation = Means(), Means()
        # Both would print a dictionary at every log, where an evaluation has its line.
        self.pop_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback):
            self.add_callback(QuietProgress)

    @property
    def plain_model(self) -> PreTrainedModel:
        """The plain transformers model that is being trained."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def saved_step(self) -> int:
        """The step whose weights the model has once `train` is through."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        return best or self.state.global_step

    @property
    def train_seconds(self) -> float:
        """How long the run has trained, in all of its starts."""
        return self._seconds_before + (time.monotonic() - self._begun if self.is_in_train else self._seconds)

    def prepare(self, model: PreTrainedModel) -> None:
        """Keep a model that cannot do with less in float32. Compile it in place where `--torch_compile` asks for that
        and it may gain by it."""
        if self.args.bf16 or self.args.fp16:
            keep_in_float32(model, self.args.device)
        if self.args.torch_compile and self.args.device.type not in _NOT_COMPILED:
            model.compile(dynamic=True, backend=self._compiler)

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        share_batches(loader)
        return loader

    # The Trainer would drop a dev or test set's last rows as it drops the training set's.

    def get_eval_dataloader(self, eval_dataset: Dataset | str | None = None) -> DataLoader:
        return self._all_rows(super().get_eval_dataloader, eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        return self._all_rows(super().get_test_dataloader, test_dataset)

    def _all_rows(self, make_loader, dataset) -> DataLoader:
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return make_loader(dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        if resume_from_checkpoint is not None:
            self._seconds_before = seconds_at(Path(resume_from_checkpoint))
        self._begun = time.monotonic()
        try:
            output = super().train(resume_from_checkpoint, **kwargs)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(self.how_to_go_on or "there is no checkpoint yet") from interrupt
        except OSError as error:
            # A full disk that names no file is TensorBoard's log; all else that is written is named.
            if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            with writing(self._folder / "runs"):
                raise
        self._seconds = time.monotonic() - self._begun
        return output

    @property
    def how_to_go_on(self) -> str | None:
        """What a run that was interrupted goes on from, in words; None where it has no checkpoint."""
        kept = last_checkpoint(self._folder)
        return kept and f"--resume_from_checkpoint goes on from {kept}"

    def remove_spare_checkpoints(self) -> None:
        """Once the finished model is saved: with a limit of one checkpoint, the best stays and the last goes."""
        if self._limit == 1 and self.best_checkpoint:
            keep(self._folder, 0, self.best_checkpoint)

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint whose weights the run ends with; None where that is simply the last step."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        return self._folder / checkpoint_name(best) if best else None

    def check_best_checkpoint(self) -> None:
        """Raise InputError where the best checkpoint so far is not there."""
        if self.best_checkpoint and self.best_checkpoint not in checkpoints(self._folder):
            there = ", ".join(path.name for path in checkpoints(self._folder)) or "no checkpoint"
            raise InputError(f"{self.best_checkpoint}: the run's best checkpoint is gone; there is {there}")

    def _save_checkpoint(self, model, trial) -> None:
        name, writes = checkpoint_name(self.state.global_step), self.args.should_save
        aside = self._folder / f".saving-{name}"
        try:
            with writing(self._folder / name):
                if writes:
                    begin(aside)
                self.accelerator.wait_for_everyone()
                self._saving_into = aside
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if writes:
                    # Which step was best is kept, and not where its checkpoint lay: the folder may be moved.
                    self.state.best_model_checkpoint = None
                    self.state.save_to_json(str(aside / name / "trainer_state.json"))
                    complete(aside / name, self._folder, self._experiment, self.train_seconds)
                    forget_replaced_run(self._folder)
                    keep(self._folder, self._limit, self.best_checkpoint)
                self.accelerator.wait_for_everyone()
        finally:
            self._saving_into = None
            if writes and aside.exists():
                with writing(self._folder):
                    remove(aside)
        self.state.best_model_checkpoint = self.best_checkpoint and str(self.best_checkpoint)

    def _get_output_dir(self, trial) -> str:
        return str(self._saving_into or self._folder)

    def _load_best_model(self) -> None:
        self.check_best_checkpoint()
        with reading(str(self.best_checkpoint)):
            self.restore_plain_model(self.best_checkpoint)

    # What is trained, in a checkpoint and out of it; a trainer that trains more than a plain model has its own.

    def save_trained(self, folder: Path) -> None:
        """Write all that is trained into a checkpoint."""
        save_weights(self.plain_model, folder)

    def restore_trained(self, checkpoint: Path) -> None:
        """Go on from what `save_trained` wrote."""
        restore_weights(self.plain_model, checkpoint)

    def restore_plain_model(self, checkpoint: Path) -> None:
        """Give the plain model the weights that it had at a checkpoint."""
        restore_weights(self.plain_model, checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.save_trained(folder)
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        with reading(resume_from_checkpoint):
            self.restore_trained(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(f"{checkpoint}, its optimizer"):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.check_best_checkpoint()
            self.state.best_model_checkpoint = self.best_checkpoint and str(self.best_checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(f"{checkpoint}, its random state"):
            super()._load_rng_state(checkpoint)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(loss):
            self.stop_diverged(f"the loss is {float(loss)} at step {self.state.global_step + 1}")
        return loss

    def stop_diverged(self, what: str) -> NoReturn:
        """End a run whose numbers have left the finite, before anything of it is saved."""
        kept = last_checkpoint(self._folder)
        raise InputError(
            f"{what}; nothing was saved after it, "
            + (f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet")
            + f"; a smaller --learning_rate (now {self.args.learning_rate}) often helps"
        )

    def record(self, losses: dict[str, torch.Tensor]) -> None:
        """Take a step's losses into the log and the next evaluation's line."""
        self._since_log.add(losses)
        self._since_evaluation.add(losses)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if any(key.startswith("eval_") for key in logs):
            logs = logs | self._since_evaluation.take()
        elif "loss" in logs:
            logs = logs | self._since_log.take()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        before = len(self.state.log_history)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        # The Trainer saves after it has evaluated, so weights that the last update broke are never saved.
        if self.is_in_train and not math.isfinite(metrics.get(f"{metric_key_prefix}_loss", 0)):
            self.stop_diverged(
                f"the dev loss is {metrics[f'{metric_key_prefix}_loss']} at step {self.state.global_step}"
            )
        # With several dev sets the Trainer comes back here for each; the line is printed once, for all of them.
        if metric_key_prefix == "eval" and self.is_world_process_zero():
            logged = {key: value for entry in self.state.log_history[before:] for key, value in entry.items()}
            tqdm.write(self.evaluation_line(logged))
        return metrics

    def evaluation_line(self, logged: dict[str, float]) -> str:
        """What is printed of an evaluation, from all that was logged of it."""
        return evaluation_line(self.state, logged, self.is_in_train)
