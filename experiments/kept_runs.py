"""What a comparison reads of its runs, without their models: small enough to be kept beside its tables."""

from pathlib import Path

import numpy as np

from bert_finetune.files import replacing_file, write_json
from bert_finetune.paths import for_others, run_for_others
from experiments.finished_runs import FinishedRun


def keep_runs(runs: list[FinishedRun], roots: list[Path], target: Path) -> None:
    """Copy each run's record, figures, options and answers to its place below `target`, with the paths of others' use.

    From there `compare_results.py` makes the same tables, but for sizes and times, which need the models.
    """
    for run in runs:
        root = next(root for root in roots if run.folder.is_relative_to(root))
        folder = target / run.folder.relative_to(root)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "eval_results.json", run.results)
        if run.args:
            write_json(folder / "args.json", run_for_others(run.args))
        if run.record:
            write_json(folder.with_name(f"{folder.name}.json"), for_others(run.record))
        for path in run.folder.glob("*_predictions.npz"):
            with np.load(path) as arrays, replacing_file(folder / path.name) as aside, open(aside, "wb") as file:
                np.savez_compressed(file, **dict(arrays))
