r"""Distil a fine-tuned teacher into a small student: every student layer learns from every teacher layer.

    python bert_emd/emd_task_distill.py --teacher_model model/RTE/teacher --student_layers 3 --task_name RTE \
        --data_dir glue_data/RTE --output_dir model/RTE/student
    python bert_emd/emd_task_distill.py --teacher_model my-classifier --student_layers 3 --train_file train.csv \
        --validation_file dev.csv --output_dir my-small-classifier

Several GPUs: torchrun --nproc_per_node 4 bert_emd/emd_task_distill.py ... (or accelerate launch). The options of
transformers' TrainingArguments work too, but for label smoothing, NEFTune and gradient checkpointing.
"""

from bert_emd.arguments import read_options
from bert_finetune.errors import reports_input_errors
from bert_finetune.processes import leave_group


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    options = read_options(argv, __doc__)

    from bert_emd.task_distillation import distil, evaluate_student

    *_, args = options
    (distil if args.do_train else evaluate_student)(*options)
    leave_group()


if __name__ == "__main__":
    main()
