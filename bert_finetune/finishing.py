"""What a finished run writes, and in which order: `finish`, with which every training script ends."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch.utils.hooks import RemovableHandle
from transformers import DataCollatorWithPadding, PreTrainedModel
from transformers.integrations import TensorBoardCallback

from bert_finetune.checkpoints import save_classifier
from bert_finetune.data import columns_of_file
from bert_finetune.errors import writing
from bert_finetune.files import as_csv, replacing_file, write_atomically, write_json
from bert_finetune.footprint import measure_models
from bert_finetune.model_card import CardRow, write_model_card
from bert_finetune.outputs import forget_figures, forget_replaced_run, with_probabilities
from bert_finetune.run_arguments import RunArguments
from bert_finetune.run_trainer import RunTrainer
from bert_finetune.samplers import batches_longest_first
from bert_finetune.submission import as_file
from bert_finetune.training import Answers, Measurement, TaskTrainer
from bert_finetune.training_log import all_figures, format_figures, history

# Into the output folder goes what each of these writes; it returns the pictures (PNG) among that.
Writer = Callable[[Path], list[Path]]


@dataclass
class Ending:
    """What a script knows of its run at the end that the trainer does not.

    origin: where the model comes from, a sentence of its card. compared: models for the card's table, above the run's
    own: name, model, dev figures. figures: more results, for eval_results. writers: more files; the first picture of
    all that they return goes into the card. hooks: on the model as it was trained, and not on the model that is saved;
    without them it is measured once more.
    """

    origin: str
    compared: Sequence[tuple[str, PreTrainedModel, dict[str, float]]] = ()
    figures: dict[str, float] = field(default_factory=dict)
    writers: Sequence[Writer] = ()
    hooks: Sequence[RemovableHandle] = ()


def finish(trainer: TaskTrainer, test: dict[str, Dataset], ending: Ending, file: Callable[[str], Path]) -> None:
    """Test predictions, the model (the best one, once `train` is through), its results, more files, the card.

    file: of `write_predictions`. All processes take part in measuring; the first one writes.
    """
    with saying_how_to_go_on(trainer):
        measured = trainer.measure()  # before predictions, which go by the thresholds that this chooses
        write_predictions(trainer, test, file)
        _finish(trainer, ending, measured)


@contextmanager
def saying_how_to_go_on(trainer: RunTrainer) -> Iterator[None]:
    """Around the end of a run: Ctrl-C is told with what the run goes on from."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(*filter(None, [trainer.how_to_go_on])) from interrupt


def _finish(trainer: TaskTrainer, ending: Ending, measured: Measurement) -> None:
    results = {
        "task": trainer.task.name,
        "global_step": trainer.saved_step,
        "train_seconds": round(trainer.train_seconds, 1),
    }
    results |= {"precision": precision(trainer.args)} | measured.figures | ending.figures
    saved = measured.figures
    if ending.hooks:
        for hook in ending.hooks:
            hook.remove()
        saved = trainer.measure().figures
        results |= {f"own_head_{key}": value for key, value in saved.items()}
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    if results["precision"] != "float32":
        results |= {f"float32_{key}": value for key, value in figures_in_float32(trainer).items()}
    if ending.hooks:
        print(f"figures are with a relu before the classifier; the saved model as it is: {format_figures(saved)}")
    pictures = write_run(trainer, results, ending.writers)
    write_answers(folder, measured.answers)
    _write_card(trainer, ending, saved, results, pictures)
    trainer.remove_spare_checkpoints()
    print(f"saved in {folder}, step {results['global_step']}  {all_figures(results)}")


def write_run(trainer: RunTrainer, results: dict, writers: Sequence[Writer]) -> list[Path]:
    """Write the model, its `results` and what the writers have; returns the pictures among that, which go into
    TensorBoard's log too."""
    folder = Path(trainer.args.output_dir)
    forget_figures(folder)
    save_classifier(trainer.plain_model, trainer.processing_class, folder)
    forget_replaced_run(folder)
    write_eval_results(folder, results, history(trainer.state))
    pictures = [picture for write in writers for picture in write(folder)]
    _show_in_tensorboard(trainer, pictures)
    return pictures


def precision(args: RunArguments) -> str:
    """In which the models of a run compute."""
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


@torch.inference_mode()
def figures_in_float32(trainer: TaskTrainer) -> dict[str, float]:
    """The figures of the model as who loads it will have it, without the wrapper of a run in lower precision."""
    model = trainer.accelerator.unwrap_model(trainer.plain_model, keep_fp32_wrapper=False).eval()
    figures = {}
    for prefix, dataset in trainer.measured.items():
        logits, labels = [], []
        size = trainer.args.per_device_eval_batch_size
        for batch in batches_longest_first(dataset, trainer.processing_class, size):
            if "labels" in batch:
                labels.append(batch.pop("labels"))
            logits.append(model(**batch.to(model.device)).logits.float().cpu())
        answers = torch.cat(logits).numpy()
        found = trainer.task.measure(answers, torch.cat(labels).numpy()) if labels else {}
        figures |= {f"{prefix}_{name}": value for name, value in found.items()}
        figures |= trainer.agreement(prefix, answers, dataset)
    return figures


def write_predictions(trainer: TaskTrainer, test: dict[str, Dataset], file: Callable[[str], Path]) -> None:
    """Predict each test split and write it as the GLUE server wants it: `index<TAB>prediction` rows, one for each row
    of the test file in its order; with `--probabilities` these too, beside the rows of the split's `file`.

    A prediction is the label as GLUE's files write it (a class name for MNLI, QNLI and RTE, 0 or 1 elsewhere; for STS-B
    a number kept within 0 and 5), for a task of the user's own the model's class name.
    """
    for split, dataset in test.items():
        logits = trainer.predict(dataset, metric_key_prefix="predicted").predictions
        if trainer.is_world_process_zero():
            path = Path(trainer.args.output_dir) / trainer.task.submission[split]
            write_atomically(path, as_file(trainer.task.kind.written(logits)))
            print(f"{path}: {len(dataset)} predictions")
            if trainer.args.probabilities:
                _write_probabilities(trainer, path, file(trainer.task.test[split]), logits)


def _write_probabilities(trainer: TaskTrainer, predictions: Path, source: Path, logits: np.ndarray) -> None:
    kind, path = trainer.task.kind, predictions.with_name(with_probabilities(predictions.name))
    rows = columns_of_file(trainer.task, source)
    columns = zip(kind.probability_columns, kind.probabilities(logits).T.tolist(), strict=True)
    rows |= {name: [f"{value:.6g}" for value in values] for name, values in columns}
    write_atomically(path, as_csv([dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]))
    print(f"{path}: {', '.join(kind.probability_columns)} of {len(logits)} rows")


def write_eval_results(folder: Path, results: dict, evaluations: list[dict]) -> None:
    """`eval_results.json` with the history, and `eval_results.txt` with a `key = value` line for each figure."""
    write_json(folder / "eval_results.json", results | {"history": evaluations})
    write_atomically(folder / "eval_results.txt", "".join(f"{key} = {value}\n" for key, value in results.items()))


def write_answers(folder: Path, answers: dict[str, Answers]) -> None:
    """`dev_predictions.npz`, and `test_predictions.npz` of a held-out set: the finished model's `logits` (examples,
    outputs), `labels` and `teacher_logits`, as far as there are such, in the order of the file, and `thresholds` and
    `teacher_thresholds` where texts have several labels; with several dev sets (MNLI) each name after that of its set,
    `matched/logits`."""
    files = {}
    for prefix, found in answers.items():
        kind, _, split = prefix.partition("_")
        arrays = {"/".join(filter(None, (split, name))): array for name, array in found.arrays.items()}
        files.setdefault("dev" if kind == "eval" else kind, {}).update(arrays)
    for kind, arrays in files.items():
        with replacing_file(folder / f"{kind}_predictions.npz") as aside:
            np.savez(aside, **arrays)


def _show_in_tensorboard(trainer: RunTrainer, pictures: list[Path]) -> None:
    """Put PNG files into the run's TensorBoard log, where it keeps one, each named after its file."""
    if not pictures:
        return
    from matplotlib.image import imread
    from tensorboardX import SummaryWriter

    # The Trainer closes its own events file when training ends; another one in its folder is read with it. Both are
    # named by the second, and a run may take no longer.
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir:
            with (
                writing(Path(trainer.args.output_dir, "runs")),
                SummaryWriter(log_dir=callback.logging_dir, filename_suffix=".pictures") as log,
            ):
                for path in pictures:
                    log.add_image(path.stem, imread(path), trainer.state.global_step, dataformats="HWC")


def _in_words(results: dict) -> str:
    """Of which precision the card's figures are, and what the model gives in float32."""
    plain = {key.removeprefix("float32_"): value for key, value in results.items() if key.startswith("float32_")}
    told = f", measured in {results['precision']}; of this model in float32: {format_figures(plain)}" if plain else ""
    return f"Figures are of the dev set{told}."


def _write_card(
    trainer: TaskTrainer, ending: Ending, figures: dict[str, float], results: dict, pictures: list[Path]
) -> None:
    rows = [*ending.compared, ("this model", trainer.plain_model, figures)]
    dev = next(iter(trainer.dev.values()))
    examples = [{k: v for k, v in dev[k].items() if k != "labels"} for k in range(min(len(dev), 32))]
    batch = DataCollatorWithPadding(trainer.processing_class)(examples).to(trainer.args.device)
    # Without the wrapper that makes a run in bf16 or fp16 compute so: times are of float32.
    models = [trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False) for _, model, _ in rows]
    footprints = measure_models(models, batch)
    on_gpu = trainer.args.device.type == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    write_model_card(
        trainer.args.output_dir,
        trainer.task,
        ending.origin,
        [CardRow(*row, footprint) for row, footprint in zip(rows, footprints, strict=True)],
        f"{_in_words(results)} Times are of a batch of {len(examples)} dev examples on {where}, float32, tokenised "
        "before.",
        pictures[0].name if pictures else None,
    )
