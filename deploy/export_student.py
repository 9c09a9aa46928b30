"""Export a student to ONNX, in float32 and with int8 weights, and check both on its dev set before saying done.

    python deploy/export_student.py --model model/SST-2/student --data_dir glue_data/SST-2
    python deploy/export_student.py --model my-small-classifier --validation_file dev.csv --text_column review

writes `<model>/onnx/`: model.onnx, model_quantized.onnx, the configuration with the classes' names, the tokenizer, and
export.json with versions, checksums and all figures; the model's card gets their table. --model is a folder of either
training script, which knows its task, or any classifier of transformers', in a folder or on the hub. What it needs on
top of requirements.txt is in requirements-deploy.txt. --format openvino writes `<model>/openvino/`, a model of float32
alone, and needs requirements-openvino.txt.
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from bert_finetune.arguments import TaskArguments, options_of_run
from bert_finetune.command_line import plain_parser
from bert_finetune.errors import InputError, reports_input_errors
from deploy.formats import FORMATS


@dataclass
class ExportArguments:
    """What to export, and how much int8 may cost."""

    model: str = HfArg(help="The student: a folder, or a name on the hub.")
    output_dir: str | None = HfArg(default=None, help="Where the export goes; left out, <model>/<format>.")
    format: Literal["onnx", "openvino"] = HfArg(default="onnx", help="What is written; openvino only in float32.")
    max_drop: float = HfArg(
        default=1.0,
        help="How many points of the task's figure int8 may lose on the dev set. Beyond, finer ways are tried, a scale "
        "for each channel and then the embeddings and the head in float; if none will do, the export ends with exit "
        "code 1 and leaves only the float model.",
    )
    per_channel: bool = HfArg(default=False, help="Begin with a scale for each channel.")

    def __post_init__(self):
        if not self.max_drop >= 0:
            raise InputError(f"--max_drop {self.max_drop}: must be 0 or more points")
        if self.per_channel and not FORMATS[self.format].quantizations:
            raise InputError(f"--per_channel: --format {self.format} has no int8")


# Options of a task that have no meaning here.
_TRAINING = ("train_file", "test_file")


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    parser = plain_parser(ExportArguments, TaskArguments, description=__doc__, hidden=_TRAINING)
    argv = sys.argv[1:] if argv is None else argv
    given = parser.parse_known_args(argv)[0]
    if any(getattr(given, name) for name in _TRAINING):
        raise InputError("--train_file and --test_file: have no place here; give --validation_file, or --data_dir")
    trained = options_of_run(given.model)
    if not (given.validation_file or given.dataset_name):
        parser.set_defaults(task_name=trained.get("task_name"))
    _, task_args = parser.dataclasses(argv)
    # The precision of the training, which is remembered too, is no option of an export.
    parser.set_defaults(**{name: trained[name] for name in task_args.remembered if name in trained and name in given})
    options, task_args = parser.dataclasses(argv)
    if not options.output_dir and not Path(options.model).is_dir():
        raise InputError(f"--output_dir is missing: {options.model} is no folder to put the export into")
    wanted = FORMATS[options.format]
    for package in wanted.packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"needs {package}: pip install -r {wanted.requirements}")

    from deploy.export import export

    if not export(options, task_args):
        sys.exit(1)


if __name__ == "__main__":
    main()
