r"""Distil a teacher into a small student on running text, before there is a task: only layers teach.

    python bert_emd/general_distill.py --corpus text.txt --teacher_model bert-base-uncased --student_config 4x312 \
        --output_dir model/general/4x312
    python bert_emd/emd_task_distill.py --student_model model/general/4x312 --teacher_model model/RTE/teacher \
        --task_name RTE --data_dir glue_data/RTE --output_dir model/RTE/student

Several GPUs: torchrun --nproc_per_node 4 bert_emd/general_distill.py ... (or accelerate launch). The options of
transformers' TrainingArguments work too, but for label smoothing, NEFTune and gradient checkpointing.
"""

from bert_emd.general_arguments import read_options
from bert_finetune.errors import reports_input_errors
from bert_finetune.processes import leave_group


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    options = read_options(argv, __doc__)

    from bert_emd.general_distillation import distil

    distil(*options)
    leave_group()


if __name__ == "__main__":
    main()
