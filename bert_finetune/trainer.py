"""transformers' Trainer with what every run here shares: GLUE metrics, one line per evaluation, a stop at NaN."""

import copy
import errno
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from matplotlib.image import imread
from tensorboardX import SummaryWriter
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PredictionOutput

from bert_finetune.arguments import RunArguments
from bert_finetune.checkpoints import save_classifier
from bert_finetune.errors import InputError, reading, writing
from bert_finetune.files import replacing_file
from bert_finetune.footprint import measure_models
from bert_finetune.glue import Task
from bert_finetune.metrics import compute_metrics
from bert_finetune.model_card import Measured, write_model_card
from bert_finetune.outputs import last_checkpoint, remove_incomplete, write_eval_results
from bert_finetune.predictions import write_predictions
from bert_finetune.processes import mean_over_processes, share_of_step

# Devices on which compiled models gain nothing. On 2 CPU cores a forward pass of BERT-base (32 x 128) took 5.8 s
# compiled and 6.5 s as it is, a training step of a 4 x 312 student 1.9 and 1.5 s; both took a minute to compile.
_NOT_COMPILED = ("cpu",)


def check_batch(args: RunArguments, train_dataset: Dataset) -> None:
    """Raise InputError where no training batch would be left."""
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and len(train_dataset) < batch:
        raise InputError(
            f"--dataloader_drop_last: the training file has {len(train_dataset)} rows, fewer than a batch of {batch}"
        )


class Means:
    """Running means of named losses, over steps and processes, kept on their device until they are asked for."""

    def __init__(self):
        self._sums, self._count = {}, 0

    def add(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._count += 1

    def take(self) -> dict[str, float]:
        """The means since the last call; empty when nothing was added. All processes must ask."""
        means = {name: float(mean_over_processes(total)) / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means


class LengthGroupedBatches(LengthGroupedSampler):
    """Random batches of examples of similar length, the same in epoch k whether or not the run was interrupted.

    `epoch()` says which epoch begins; wrappers around a sampler do not reliably pass that on.
    """

    def __init__(self, batch_size: int, dataset: Dataset, seed: int, epoch: Callable[[], int]):
        super().__init__(batch_size, lengths=_lengths(dataset), generator=torch.Generator())
        self._seed, self._epoch = seed, epoch

    def __iter__(self):
        self.generator.manual_seed(self._seed + self._epoch())
        return super().__iter__()


class SharedBatches(BatchSampler):
    """The batches of a single process, each cut into one part for every process: accelerate deals the parts out.

    accelerate by itself fills an epoch's last batches up with rows of its first. Here they have what is left, and some
    processes a row less than others; a row is given twice only where fewer are left than there are processes.
    """

    def __init__(self, sampler: Sampler, batch_size: int, drop_last: bool, processes: int):
        super().__init__(sampler, batch_size * processes, drop_last)
        self._processes = processes

    def __iter__(self):
        for batch in super().__iter__():
            rows = np.resize(batch, max(len(batch), self._processes))
            yield from (part.tolist() for part in np.array_split(rows, self._processes))

    def __len__(self) -> int:
        return super().__len__() * self._processes


class QuietProgress(ProgressCallback):
    """The progress bars without a dictionary printed at every log: `TaskTrainer` prints its own line."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


class TaskTrainer(Trainer):
    """A Trainer for one GLUE task.

    `eval_datasets`: dev split name -> dataset; with more than one (MNLI) every figure carries the split's name. The
    losses that a step computes go to the log and, as means since the last evaluation, into the evaluation's line.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: RunArguments,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        train_dataset: Dataset | None = None,
        eval_datasets: dict[str, Dataset] | None = None,
        **kwargs,
    ):
        args = copy.copy(args)
        args.label_names = ["labels"]
        if train_dataset is None:
            args.report_to = []  # an evaluation by itself leaves no log
        args.push_to_hub = False  # done by the script, once all is finished
        args.metric_for_best_model = task.dev_figure(args.metric_for_best_model or task.metric)
        args.greater_is_better = not args.metric_for_best_model.endswith("loss")
        args._n_gpu = min(args.n_gpu, 1)  # several GPUs: one process each, by torchrun or accelerate
        # Compiled by `compile_model`, and not by accelerate anew for several lengths.
        self._compiler, args.torch_compile_backend = args.torch_compile_backend, None
        super().__init__(
            model,
            args,
            data_collator=kwargs.pop("data_collator", None) or DataCollatorWithPadding(tokenizer),
            train_dataset=train_dataset,
            eval_dataset=_single(eval_datasets),
            processing_class=tokenizer,
            compute_metrics=self._compute_metrics,
            **kwargs,
        )
        self.compile_model(self.classifier)
        self.task = task
        self.model_accepts_loss_kwargs = False  # every loss here is a mean over its batch
        self._since_log, self._since_evaluation = Means(), Means()
        self._finally: dict[
            str, dict
        ] = {}  # the finished model's logits and the labels of each dev set, in the order of its file
        if not args.disable_tqdm:
            self.pop_callback(ProgressCallback)
            self.add_callback(QuietProgress)

    def compile_model(self, model: PreTrainedModel) -> None:
        """Compile a model in place where `--torch_compile` asks for it and it may gain by it."""
        if self.args.torch_compile and self.args.device.type not in _NOT_COMPILED:
            model.compile(dynamic=True, backend=self._compiler, mode=self.args.torch_compile_mode)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedBatches(
            self.args.train_batch_size * self.args.world_size,
            train_dataset or self.train_dataset,
            seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def _get_dataloader(self, *args, is_training: bool = False, **kwargs) -> DataLoader:
        # The Trainer would drop a dev or test set's last rows too.
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            loader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last
        shard = loader.batch_sampler
        if is_training and isinstance(shard, BatchSamplerShard) and not shard.split_batches:
            whole, shard.even_batches = shard.batch_sampler, False
            shard.batch_sampler = SharedBatches(whole.sampler, whole.batch_size, whole.drop_last, shard.num_processes)
        return loader

    # Evaluation goes from the longest example to the shortest, which wastes little on padding; no figure depends on
    # the order, and `predict` puts its rows back into the dataset's.

    def _get_eval_sampler(self, eval_dataset: Dataset) -> list[int]:
        return _longest_first(eval_dataset)

    def predict(self, test_dataset: Dataset, *args, **kwargs) -> PredictionOutput:
        output = super().predict(test_dataset, *args, **kwargs)
        back = np.argsort(_longest_first(test_dataset))
        labels = None if output.label_ids is None else output.label_ids[back]
        return PredictionOutput(output.predictions[back], labels, output.metrics)

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        except KeyboardInterrupt:
            kept = last_checkpoint(self.args.output_dir)
            raise KeyboardInterrupt(
                f"--resume_from_checkpoint goes on from {kept}" if kept else "there is no checkpoint yet"
            ) from None
        except OSError as error:
            # A full disk that names no file is TensorBoard's log; all else that is written is named.
            if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            with writing(Path(self.args.output_dir, "runs")):
                raise

    def _save_checkpoint(self, model, trial) -> None:
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        try:
            with writing(folder / name, Exception):  # safetensors, torch and tokenizers: each raises its own
                super()._save_checkpoint(model, trial)
        except BaseException:
            remove_incomplete(folder.glob(name))
            raise

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        with reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(f"{checkpoint}, its optimizer"):
            super()._load_optimizer_and_scheduler(checkpoint)

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
        kept = last_checkpoint(self.args.output_dir)
        raise InputError(
            f"{what}; nothing was saved after it, "
            + (f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet")
            + f"; a smaller --learning_rate (now {self.args.learning_rate}) often helps"
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if model.training:
            loss = loss * share_of_step(outputs.logits)
            self.record({"train_loss": loss})
        return (loss, outputs) if return_outputs else loss

    def record(self, losses: dict[str, torch.Tensor]) -> None:
        """Take a step's losses into the log and the next evaluation's line."""
        self._since_log.add(losses)
        self._since_evaluation.add(losses)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if f"{metric_key_prefix}_loss" in output.metrics:
            # Several processes evaluate some rows twice, and the Trainer's own mean is over all of these.
            logits, labels = torch.from_numpy(output.predictions).float(), torch.from_numpy(output.label_ids)
            if self.task.is_regression:
                loss = functional.mse_loss(logits.view(-1), labels.float())
            else:
                loss = functional.cross_entropy(logits, labels)
            output.metrics[f"{metric_key_prefix}_loss"] = loss.item()
        if metric_key_prefix.startswith("final") and metric_key_prefix not in self._finally:
            back = np.argsort(_longest_first(dataloader.dataset))
            self._finally[metric_key_prefix] = {"logits": output.predictions[back], "labels": output.label_ids[back]}
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if any(key.startswith("final_") for key in logs):
            return  # the finished model's figures belong to the results, not to the history
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
            tqdm.write(self._line(logged))
        return metrics

    @property
    def classifier(self) -> PreTrainedModel:
        """The plain transformers model that is being trained."""
        return self.accelerator.unwrap_model(self.model)

    def finish_training(self) -> None:
        """Save the model (the best one, once `train` is through) and its results into `output_dir`."""
        results = self.results()
        if self.is_world_process_zero():
            save_classifier(self.classifier, self.processing_class, self.args.output_dir)
            write_eval_results(self.args.output_dir, results, self.history())
            self.write_dev_predictions()
            self.write_card(results)
            print(f"saved in {self.args.output_dir}, step {results['global_step']}  dev: {format_figures(results)}")

    def compared_models(self, results: dict) -> list[tuple[str, PreTrainedModel, dict]]:
        """The rows of the output folder's model card: name, model, dev figures; the model of the folder last."""
        return [("this model", self.classifier, results)]

    def origin(self) -> str:
        """Where the model comes from, in a sentence of its card."""
        return f"Fine-tuned from `{self.classifier.config.name_or_path}`."

    def write_card(self, results: dict, picture: str | None = None) -> None:
        """Write the output folder's README.md, with `picture` (a file beside it) in it."""
        rows = self.compared_models(results)
        dev = next(iter(self.eval_dataset.values())) if isinstance(self.eval_dataset, dict) else self.eval_dataset
        examples = [{k: v for k, v in dev[k].items() if k != "labels"} for k in range(min(len(dev), 32))]
        batch = DataCollatorWithPadding(self.processing_class)(examples).to(self.args.device)
        # Without the wrapper that makes a run in bf16 or fp16 compute so: times are of float32.
        models = [self.accelerator.unwrap_model(model, keep_fp32_wrapper=False) for _, model, _ in rows]
        footprints = measure_models(models, batch)
        on_gpu = self.args.device.type == "cuda"
        where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
        write_model_card(
            self.args.output_dir,
            self.task,
            self.origin(),
            [Measured(*row, footprint) for row, footprint in zip(rows, footprints, strict=True)],
            f"Times are of a batch of {len(examples)} dev examples on {where}, float32, tokenised before.",
            picture,
        )

    def show_pictures(self, pictures: list[Path]) -> None:
        """Put PNG files into the run's TensorBoard log, where it keeps one, each named after its file."""
        # The Trainer closes its own events file when training ends; another one in its folder is read with it.
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir:
                with writing(Path(self.args.output_dir, "runs")), SummaryWriter(log_dir=callback.logging_dir) as log:
                    for path in pictures:
                        log.add_image(path.stem, imread(path), self.state.global_step, dataformats="HWC")

    def results(self) -> dict:
        """What `eval_results.txt` holds: the task, the step whose weights are saved, the seconds that this process
        trained, dev figures."""
        step = self.state.global_step
        if self.args.load_best_model_at_end and self.state.best_global_step:
            step = self.state.best_global_step
        seconds = [entry["train_runtime"] for entry in self.state.log_history if "train_runtime" in entry]
        return {"task": self.task.name, "global_step": step, "train_seconds": seconds[-1], **self.final_figures()}

    def final_figures(self) -> dict[str, float]:
        """The dev figures of the model as it is now, named `eval_...` but no part of the history."""
        metrics = self.evaluate(metric_key_prefix="final")
        return {
            key.replace("final_", "eval_", 1): value
            for key, value in metrics.items()
            if key.startswith("final_") and is_figure(key)
        }

    def write_dev_predictions(self) -> None:
        """`dev_predictions.npz`: `logits` (examples, classes) and `labels` of the finished model, in the order of the
        dev file; with several dev sets (MNLI) each name after that of its set, `m/logits`."""
        arrays = {}
        for prefix, answers in self._finally.items():
            name = prefix.removeprefix("final").removeprefix("_")
            arrays |= {f"{name}/{kind}" if name else kind: values for kind, values in answers.items()}
        with replacing_file(Path(self.args.output_dir) / "dev_predictions.npz") as aside:
            np.savez(aside, **arrays)

    def write_predictions(self, test_datasets: dict[str, Dataset]) -> None:
        """Predict each test split and write it for the GLUE server, beside the model."""
        for split, dataset in test_datasets.items():
            logits = self.predict(dataset, metric_key_prefix="test").predictions
            if self.is_world_process_zero():
                path = write_predictions(self.task, split, logits, self.args.output_dir)
                print(f"{path}: {len(dataset)} predictions")

    def history(self) -> list[dict]:
        """One entry per evaluation so far: step, epoch, mean training losses, dev figures."""
        entries = {}
        for entry in self.state.log_history:
            if any(key.startswith("eval_") for key in entry):
                entries.setdefault(entry["step"], {}).update({k: v for k, v in entry.items() if is_figure(k)})
        return list(entries.values())

    def _compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return compute_metrics(self.task, prediction.predictions, prediction.label_ids)

    def _line(self, logged: dict[str, float]) -> str:
        parts = []
        if self.is_in_train:
            parts.append(f"step {self.state.global_step}/{self.state.max_steps}  epoch {self.state.epoch:.2f}")
            losses = [
                f"{key.removesuffix('_loss')} {value:.4f}" for key, value in logged.items() if _is_train_loss(key)
            ]
            parts.append("losses: " + " ".join(losses))
        parts.append("dev: " + format_figures(logged))
        return "  ".join(parts)


def format_figures(metrics: dict[str, float]) -> str:
    """The dev figures of an evaluation as `accuracy 0.8440 loss 0.3912`."""
    figures = {k.removeprefix("eval_"): v for k, v in metrics.items() if k.startswith("eval_") and is_figure(k)}
    return " ".join(f"{name} {value:.4f}" for name, value in sorted(figures.items()))


def is_figure(key: str) -> bool:
    """Whether an evaluation's entry says something about the model, not about the time it took."""
    return not key.endswith(("_per_second", "_runtime", "_preparation_time"))


def _lengths(dataset: Dataset) -> list[int]:
    return [len(ids) for ids in dataset["input_ids"]]


def _longest_first(dataset: Dataset) -> list[int]:
    lengths = _lengths(dataset)
    return sorted(range(len(lengths)), key=lambda k: -lengths[k])


def _is_train_loss(key: str) -> bool:
    return key.endswith("_loss") and not key.startswith("eval_")


def _single(datasets: dict[str, Dataset] | None):
    return next(iter(datasets.values())) if datasets and len(datasets) == 1 else datasets
