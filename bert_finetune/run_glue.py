r"""Fine-tune a BERT on a GLUE task or on your own files, evaluate it, write test predictions.

    python bert_finetune/run_glue.py --model_name_or_path bert-base-uncased --task_name RTE --data_dir glue_data/RTE \
        --do_train --do_eval --output_dir model/RTE/teacher
    python bert_finetune/run_glue.py --model_name_or_path bert-base-uncased --train_file train.csv \
        --validation_file dev.csv --do_train --do_eval --output_dir teacher

Several GPUs: torchrun --nproc_per_node 4 bert_finetune/run_glue.py ... (or accelerate launch). The options of
transformers' TrainingArguments work too.
"""

from bert_finetune.arguments import ModelArguments, TaskArguments, defaults_of_run
from bert_finetune.command_line import Parser
from bert_finetune.errors import InputError, reports_input_errors
from bert_finetune.processes import leave_group


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    parser = Parser(ModelArguments, TaskArguments, description=__doc__)
    model_args, task_args, run = parser.look(argv)
    if not (run.do_train or run.do_eval or run.do_predict):
        raise InputError("nothing to do: give --do_train, --do_eval or --do_predict")
    if not run.do_train:
        parser.set_defaults(**defaults_of_run(model_args.model_name_or_path, task_args, run))
    options = parser.parse(argv)

    from bert_finetune.fine_tuning import fine_tune

    fine_tune(*options)
    leave_group()


if __name__ == "__main__":
    main()
