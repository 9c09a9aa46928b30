"""Fine-tuning, in its order of events: model and data, training, what is left of it."""

from pathlib import Path

from transformers import set_seed

from bert_finetune.architectures import check_inputs, check_length
from bert_finetune.arguments import ModelArguments, TaskArguments
from bert_finetune.checkpoints import load_classifier, load_classifier_config, load_tokenizer
from bert_finetune.data import load_datasets
from bert_finetune.digests import data_digest, weights_digest
from bert_finetune.errors import InputError
from bert_finetune.finishing import Ending, finish, write_predictions
from bert_finetune.outputs import check_output_dir, describe_experiment, output_folder, write_run_description
from bert_finetune.paths import for_others
from bert_finetune.push import open_repository, push
from bert_finetune.run_arguments import RunArguments
from bert_finetune.training import TaskTrainer, check_batch


def fine_tune(model_args: ModelArguments, task_args: TaskArguments, args: RunArguments) -> None:
    """Train, evaluate, predict: whatever of these is asked for."""
    name, option = model_args.model_name_or_path, "--model_name_or_path"
    if args.do_train or Path(args.output_dir).resolve() != Path(name).resolve():
        check_output_dir(args, name)

    open_repository(args, name)
    config = load_classifier_config(name, option, fine_tuned=not args.do_train)
    if model_args.model_type not in (None, config.model_type):
        raise InputError(f"--model_type {model_args.model_type}: {name} is a {config.model_type}")
    task = task_args.load_task(config, fine_tuned=not args.do_train, splits=args.splits)
    task = task.chosen_by(args.metric_for_best_model)
    if args.label_smoothing_factor and not task.kind.one_class:
        raise InputError("--label_smoothing_factor: smooths over classes of which a text has one; leave it out")
    if args.label_smoothing_factor and args.class_weights != "none":
        raise InputError("--label_smoothing_factor: does not go with --class_weights; leave one of the two out")
    tokenizer = load_tokenizer(name, option, task_args.do_lower_case)
    set_seed(args.seed)  # a new head's weights are drawn here
    model = load_classifier(name, task, option, fine_tuned=not args.do_train, output_names=task_args.output_names)
    check_length(model, task_args.max_seq_length)
    check_inputs(model, tokenizer, f"{option} {name}", pair=len(task.columns) > 1)
    datasets = load_datasets(task, task_args.file, tokenizer, task_args.max_seq_length, args.splits)
    if args.do_train:
        check_batch(args, datasets.train)
        task = task.weighted(args.class_weights, datasets.train["labels"])

    if args.do_train:
        read = {"the model": weights_digest(model)}
        read["the data"] = data_digest([datasets.train, *datasets.dev.values()])
        experiment = describe_experiment(args, (model_args, task_args), read)
        with output_folder(args, experiment) as checkpoint:
            trainer = TaskTrainer(model, args, task, tokenizer, datasets.train, datasets.dev, experiment)
            write_run_description(args, model_args, task_args)
            trainer.train(resume_from_checkpoint=checkpoint)
            finish(
                trainer,
                datasets.test,
                Ending(f"Fine-tuned from `{for_others(model.config.name_or_path)}`."),
                task_args.file,
            )
    else:
        trainer = TaskTrainer(model, args, task, tokenizer, dev=datasets.dev)
        if args.do_eval:
            trainer.evaluate()
        write_predictions(trainer, datasets.test, task_args.file)
    push(args)
