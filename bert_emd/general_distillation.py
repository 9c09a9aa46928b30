"""General distillation: a student learns a teacher's layers on running text. The order of events, and the trainer."""

import copy
import datetime
import shutil
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import EvalLoopOutput

from bert_emd.attention_scores import attention_windows, expose_attention
from bert_emd.corpus import KINDS, Corpus, pack
from bert_emd.distillation import Distillation
from bert_emd.general_arguments import GeneralArguments
from bert_emd.mappings import evenly_spaced_layers
from bert_emd.narrow_student import make_student, start_from_teacher
from bert_emd.objectives import Objective
from bert_emd.starts import STARTS
from bert_emd.student import make_projections, save_projections
from bert_emd.task_distillation import make_costs, make_mapping, write_layers
from bert_emd.trainer import TeacherTrainer
from bert_finetune.architectures import attend_fully, check_inputs, check_length
from bert_finetune.checkpoints import load_encoder, load_tokenizer
from bert_finetune.digests import weights_digest
from bert_finetune.errors import InputError
from bert_finetune.finishing import precision, saying_how_to_go_on, write_run
from bert_finetune.model_card import write_encoder_card
from bert_finetune.outputs import (
    PACKED_CORPUS,
    check_output_dir,
    describe_experiment,
    forget_figures,
    output_folder,
    write_run_description,
)
from bert_finetune.paths import for_others, several
from bert_finetune.processes import found_by_first, is_main_process, mean_over_processes
from bert_finetune.push import open_repository, push
from bert_finetune.run_arguments import RunArguments
from bert_finetune.samplers import Shuffled, share_batches
from bert_finetune.training import check_batch


def distil(options: GeneralArguments, args: RunArguments) -> None:
    """Train a student on a corpus; save it with its projections, where its task's distillation finds them."""
    own_config = None if options.student_size else options.student_config
    texts = [options.dataset_name] if options.dataset_name else map(str, corpus_files(options))
    check_output_dir(args, options.teacher_model, own_config, options.corpus_cache_dir, *texts)
    open_repository(args, None)
    set_seed(args.seed)  # new weights are drawn from here on, a pooler that the teacher lacks among them
    teacher = load_encoder(options.teacher_model, "--teacher_model")
    tokenizer = load_tokenizer(options.teacher_model, "--teacher_model", options.do_lower_case)
    check_inputs(teacher, tokenizer, f"--teacher_model {options.teacher_model}", pair=True)
    student = load_student(options, teacher, tokenizer)
    for model in (teacher, student):
        check_length(model, options.max_seq_length)
    mapping = make_mapping(options, student.config, teacher.config)
    windows = attention_windows(student.config, teacher.config)
    costs = make_costs(options, args, windows, max_seq_length=options.max_seq_length)
    parts = {"embedding": options.use_embedding, "hidden": options.use_rep, "attention": options.use_att}
    looks_at = frozenset(part for part, used in parts.items() if used and mapping is not None)
    objective = Objective(None, costs, beta=1.0, theta=options.theta, looks_at=looks_at)
    if options.use_att:
        expose_attention(teacher, "--teacher_model", options.max_seq_length)
        expose_attention(student, "--student_config", options.max_seq_length)
    projections = make_projections(student, teacher.config.hidden_size, options.projection)

    def find() -> tuple[Corpus, str]:
        corpus = find_corpus(options, args.seed)
        return corpus, corpus.digest(tokenizer)

    corpus, digest = found_by_first(find)
    read = {
        "the teacher": weights_digest(teacher),
        "the student as it starts": weights_digest(torch.nn.ModuleList([student, projections])),
        "the corpus": digest,
    }
    experiment = describe_experiment(args, (options,), read)
    cache = Path(options.corpus_cache_dir or Path(args.output_dir) / PACKED_CORPUS)
    with output_folder(args, experiment) as checkpoint:
        with args.main_process_first(local=False):
            text = pack(corpus, tokenizer, cache / digest[:16])
        if is_main_process():
            print(f"corpus: {text.told}")
        check_batch(args, text.train)
        if options.student_layers and options.start.embeddings and not options.copies_teacher:
            layers = options.layers_of(teacher.config)
            start_from_teacher(
                *(student, projections, teacher.to(args.device), layers, options.start, text.train, tokenizer)
            )
        trainer = GeneralTrainer(
            Distillation(student, objective, mapping, projections),
            teacher,
            args,
            tokenizer,
            text.train,
            experiment,
            eval_dataset=text.dev,
            optimizer=options.optimizer,
        )
        write_run_description(args, options)
        before = trainer.measure()
        if before and is_main_process():
            print(f"dev loss of the student as it starts: {before['eval_loss']:.4f}")
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.record_layers()
        with saying_how_to_go_on(trainer):
            finish(trainer, before, f"Distilled on text from the layers of `{for_others(options.teacher_model)}`.")
    if args.process_index == 0 and not options.corpus_cache_dir:
        shutil.rmtree(cache, ignore_errors=True)
    sent = f"hf upload {args.hub_model_id} {args.output_dir} . " + " ".join(
        f"--exclude '{name}'" for name in ("checkpoint-*", "runs/*", "args.json")
    )
    push(args, f"`{sent}` sends it")


def finish(trainer: "GeneralTrainer", before: dict[str, float], origin: str) -> None:
    """The student (the best one, once `train` is through), its projections, its dev loss beside the one `before`, its
    card."""
    after = trainer.measure()
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    results = {
        "global_step": trainer.saved_step,
        "train_seconds": round(trainer.train_seconds, 1),
        "precision": precision(trainer.args),
    }
    results |= after | {f"start_{key}": value for key, value in before.items()} | trainer.shares

    # Where there are figures the run has finished: its maps are there before them, and never beside another's.
    forget_figures(folder)
    save_projections(trainer.distillation.projections, folder)
    write_run(trainer, results, [lambda folder: write_layers(trainer, folder)])
    write_encoder_card(folder, origin, trainer.plain_model)
    trainer.remove_spare_checkpoints()
    told = f"  dev loss {after['eval_loss']:.4f}, at the start {before['eval_loss']:.4f}" if after else ""
    print(f"saved in {folder}, step {results['global_step']}{told}")


def corpus_files(options: GeneralArguments) -> list[Path]:
    """The files of `--corpus`. Raises InputError where there are none."""
    files = [path for path in several("--corpus", options.corpus, KINDS) if not path.is_dir()]
    if not files:
        raise InputError(f"--corpus {options.corpus}: no file has such a name, only folders; add /*")
    return files


def find_corpus(options: GeneralArguments, seed: int) -> Corpus:
    """The corpus that the options name. Raises InputError for one that is not there."""
    if options.dataset_name:
        from bert_finetune.hub_datasets import dataset_file

        source = f"--dataset_name {options.dataset_name}"
        files = [dataset_file(options.dataset_name, options.dataset_config, options.train_split)]
    else:
        source = f"--corpus {options.corpus}"
        files = corpus_files(options)
    packed = options.max_seq_length, options.short_seq_prob, options.dev_share, seed
    return Corpus(tuple(files), options.text_column, *packed, source)


def load_student(
    options: GeneralArguments, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """A student with new weights, or one of the teacher's architecture for `start_from_teacher` to fill. Raises
    InputError for one that cannot be made, or cannot read what the teacher's `tokenizer` gives."""
    if options.student_layers:
        student = make_student(teacher, options.layers_of(teacher.config), options.shape, options.start)
    elif options.student_size:
        count, shape = options.student_size
        layers = evenly_spaced_layers(count, teacher.config.num_hidden_layers)
        try:
            student = make_student(teacher, layers, shape, STARTS["random"])
        except InputError as error:
            raise InputError(f"--student_config {options.student_config}: {error}") from error
    else:
        config = options.named_config
        attend_fully(config, options.student_config)
        types = 1 + max(tokenizer("a", "a").get("token_type_ids", [0]))
        for name, needed in (("vocab_size", len(tokenizer)), ("type_vocab_size", types)):
            if (size := getattr(config, name, None) or needed) < needed:
                raise InputError(
                    f"--student_config {options.student_config}: has a {name} of {size}, and the teacher's tokenizer "
                    f"needs {needed}"
                )
        student = AutoModel.from_config(config)
    # What a fine-tuned teacher calls its outputs is nothing to a student without a task.
    plain = PreTrainedConfig()
    student.config.id2label, student.config.label2id, student.config.problem_type = plain.id2label, plain.label2id, None
    return student


class GeneralTrainer(TeacherTrainer):
    """The distillation of layers on packed text. The dev figures are the loss and its terms on the held-out text,
    without dropout, under the layer weights of the moment: means over its batches, by their rows."""

    def __init__(self, distillation: Distillation, teacher: PreTrainedModel, args: RunArguments, *more, **kwargs):
        args = copy.copy(args)
        args.metric_for_best_model, args.greater_is_better = "loss", False
        super().__init__(distillation, teacher, args, *more, **kwargs)
        self._tokens, self._started, self._measuring = 0, None, 0.0

    def _get_train_sampler(self, train_dataset=None) -> Shuffled:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return Shuffled(len(self.train_dataset), seed, epoch=lambda: int(self.state.epoch or 0))

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        loader = super().get_eval_dataloader(eval_dataset)
        share_batches(loader)
        return loader

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._started is None:
            self._started, self._measuring = (time.monotonic(), self.state.global_step), 0.0
        self._tokens += inputs["attention_mask"].sum()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @torch.no_grad()
    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        began, distillation, rows = time.monotonic(), self.distillation.eval(), len(dataloader.dataset)
        whole, sums, names = self.args.eval_batch_size * self.args.world_size, 0, ()
        for k, batch in enumerate(dataloader):
            batch = self._prepare_inputs(batch)
            answers = self.ask_teacher(batch, None)
            try:
                with self.accelerator.autocast():
                    output = distillation.loss(teacher=answers, **batch)
            except FloatingPointError:
                self.stop_diverged(f"the costs between layers are not finite at step {self.state.global_step}")
            names = ("loss", *output.terms)
            # With several processes each has its part of the loss, whose mean is the whole.
            sums += torch.stack([output.loss, *output.terms.values()]).double() * min(whole, rows - k * whole)
        means = (mean_over_processes(sums) / rows).tolist()
        metrics = {f"{metric_key_prefix}_{name}": mean for name, mean in zip(names, means, strict=True)}
        self._measuring += time.monotonic() - began
        return EvalLoopOutput(None, None, metrics, rows)

    def measure(self) -> dict[str, float]:
        """The dev figures of the student as it is now, empty where nothing is held out; history and log do not hear of
        it."""
        if self.eval_dataset is None:
            return {}
        return self.evaluation_loop(self.get_eval_dataloader()).metrics

    def evaluation_line(self, logged: dict[str, float]) -> str:
        line = super().evaluation_line(logged)
        if self._started is None:
            return line
        began, first = self._started
        seconds, done = time.monotonic() - began, self.state.global_step - first
        pace = int(self._tokens) * self.args.world_size / (seconds - self._measuring)
        left = datetime.timedelta(seconds=round(seconds / done * (self.state.max_steps - self.state.global_step)))
        return f"{line}  {pace:,.0f} tokens/s, {left} left"

    def restore_plain_model(self, checkpoint: Path) -> None:
        # The best student's projections belong to it.
        self.distillation.restore(checkpoint)
