r"""Fine-tune a BERT on a GLUE task or on your own files, evaluate it, write test predictions.

    python run_glue.py --model_name_or_path bert-base-uncased --task_name RTE --data_dir ../glue_data/RTE \
        --do_train --do_eval --output_dir ../model/RTE/teacher
    python run_glue.py --model_name_or_path bert-base-uncased --train_file train.csv --validation_file dev.csv \
        --do_train --do_eval --output_dir teacher

Several GPUs: torchrun --nproc_per_node 4 run_glue.py ... (or accelerate launch). The options of
transformers' TrainingArguments work too.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import set_seed
from transformers.hf_argparser import HfArg

from bert_finetune.arguments import Parser, RunArguments, TaskArguments
from bert_finetune.checkpoints import check_length, load_classifier, load_config, load_tokenizer
from bert_finetune.data import load_datasets
from bert_finetune.errors import InputError, reports_input_errors
from bert_finetune.metrics import check_metric
from bert_finetune.outputs import check_output_dir, start_output_dir, write_run_description
from bert_finetune.push import open_repository, push
from bert_finetune.trainer import TaskTrainer, check_batch


@dataclass
class ModelArguments:
    """Which model to start from."""

    model_name_or_path: str = HfArg(help="Folder of a model, or its name on the hub.")
    model_type: str | None = HfArg(
        default=None, help="Expected architecture (bert, roberta, ...); a model of another one is refused."
    )


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    parser = Parser(ModelArguments, TaskArguments, RunArguments, description=__doc__)
    model_args, task_args, args = parser.parse(argv)
    if not (args.do_train or args.do_eval or args.do_predict):
        raise InputError("nothing to do: give --do_train, --do_eval or --do_predict")
    if args.do_train or Path(args.output_dir).resolve() != Path(model_args.model_name_or_path).resolve():
        check_output_dir(args, model_args.model_name_or_path)

    open_repository(args, model_args.model_name_or_path)
    option = "--model_name_or_path"
    config = load_config(model_args.model_name_or_path, option)
    if model_args.model_type not in (None, config.model_type):
        raise InputError(
            f"--model_type {model_args.model_type}: {model_args.model_name_or_path} is a {config.model_type}"
        )
    check_length(config, task_args.max_seq_length)
    task = task_args.load_task(config, fine_tuned=not args.do_train, splits=args.splits)
    check_metric(task, args.metric_for_best_model)
    tokenizer = load_tokenizer(model_args.model_name_or_path, option, task_args.do_lower_case)
    datasets = load_datasets(task, task_args.file, tokenizer, task_args.max_seq_length, args.splits)
    if args.do_train:
        check_batch(args, datasets.train)
    set_seed(args.seed)  # a new head's weights are drawn here
    model = load_classifier(model_args.model_name_or_path, task, option, fine_tuned=not args.do_train)

    checkpoint = start_output_dir(args) if args.do_train else None
    trainer = TaskTrainer(model, args, task, tokenizer, datasets.train, datasets.dev)
    if args.do_train:
        write_run_description(args, model_args, task_args)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.finish_training()
    elif args.do_eval:
        trainer.evaluate()
    trainer.write_predictions(datasets.test)
    push(args)


if __name__ == "__main__":
    main()
