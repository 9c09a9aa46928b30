"""Small runs with a fixed seed, and the numbers they give: a change of structure must change none of them.

    python tests/reference_runs.py            write tests/reference/<run>.json anew, from what the code gives now
    python tests/reference_runs.py --check    say for each run whether its numbers are the same to the bit

A record holds, of 20 steps in float32 on the CPU, every loss after each step, every flow and layer weight, the norm of
each of the final weights and a digest of all their bits. The bits are those of one machine; tests/test_reference.py
asks for the numbers to a tolerance, on any.
"""

import argparse
import csv
import hashlib
import json
import random
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "tests" / "reference"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

FINE_TUNE, DISTIL = "bert_finetune/run_glue.py", "bert_emd/emd_task_distill.py"
STEPS = 20

# What all runs have in common; the two scripts name a few things of their own.
_SHARED = f"""
    --max_steps {STEPS} --eval_step 1 --save_strategy no --logging_steps 1 --train_batch_size 8 --max_seq_length 32
    --learning_rate 1e-3 --seed 7 --no_cuda
""".split()
_FINE_TUNED = ["--model_name_or_path", "{student}", "--do_train"]
_DISTILLED = ["--teacher_model", "{teacher}", "--student_model", "{student}", "--bf16", "False"]
_LOSSES = [*_DISTILLED, *"--objective published --weight_momentum 0 --alpha 0.5 --beta 1 --T 2".split()]
_RTE = ["--task_name", "RTE", "--data_dir", "{data}/RTE"]
_STS = ["--task_name", "STS-B", "--data_dir", "{data}/STS-B"]
_OWN = ["--train_file", "{data}/own/train.csv", "--validation_file", "{data}/own/dev.csv"]

# Name -> script and its options. {places} are filled in by `places`.
RUNS: dict[str, tuple[str, list[str]]] = {
    "fine-tuning": (FINE_TUNE, [*_FINE_TUNED, *_RTE]),
    "fine-tuning-regression": (FINE_TUNE, [*_FINE_TUNED, *_STS]),
    "fine-tuning-own-files": (FINE_TUNE, [*_FINE_TUNED, *_OWN]),
    **{
        f"recipe-{name}": (DISTIL, [*_DISTILLED, *_RTE, "--recipe", name, "--beta", "0.1", "--num_train_epochs", "4"])
        for name in ("recommended", "authors-2022", "authors-2020")
    },
    **{
        f"mapping-{name}": (DISTIL, [*_LOSSES, *_RTE, "--layer_mapping", name])
        for name in ("emd", "uniform", "skip", "last", "none")
    },
    "separate-softmax": (DISTIL, [*_LOSSES, *_RTE, *"--separate --cost_attention softmax --T_emd 5".split()]),
    "own-layers": (
        DISTIL,
        [
            *"--teacher_model {teacher} --student_layers 1,3 --bf16 False --objective published".split(),
            *"--weight_momentum 0 --alpha 1 --beta 1 --T 1 --teacher_cache none".split(),
            *_RTE,
        ],
    ),
    "regression": (DISTIL, [*_LOSSES, *_STS, "--teacher_model", "{scorer}"]),
    "own-files": (DISTIL, [*_LOSSES, *_OWN, "--teacher_model", "{judge}"]),
    "two-processes": (DISTIL, [*_LOSSES, *_RTE, "--student_model", "{steady}", "--train_batch_size", "4"]),
}


def places(folder: Path) -> dict[str, Path]:
    """Models and data for all runs, made in `folder`."""
    from conftest import save_bert
    from glue_files import sentence, write_task

    names = ["entailment", "not_entailment"]
    narrow = {"hidden_size": 12, "num_hidden_layers": 2, "intermediate_size": 24}
    steady = narrow | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for task in ("RTE", "STS-B"):
        write_task(folder / task, task, train=48, dev=12)
    (folder / "own").mkdir()
    words, draw = {"bad": "dog", "good": "cat", "so-so": "house"}, random.Random(3)
    for split, count in (("train", 48), ("dev", 12)):
        with open(folder / "own" / f"{split}.csv", "w", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["text", "label"])
            labels = sorted(words) * (count // len(words))
            rows.writerows([f"{words[label]} {sentence(draw)}", label] for label in labels)
    return {
        "data": folder,
        "teacher": save_bert(folder / "teacher", names, seed=1),
        "scorer": save_bert(folder / "scorer", ["score"], seed=2, num_labels=1),
        "judge": save_bert(folder / "judge", sorted(words), seed=3),
        "student": save_bert(folder / "student", None, seed=4, **narrow),
        "steady": save_bert(folder / "steady", None, seed=5, **steady),
    }


def carry_out(name: str, made: dict[str, Path], out: Path) -> None:
    """Do the run `name` into the folder `out`."""
    script, options = RUNS[name]
    argv = [option.format(**made) for option in (*_SHARED, *options)] + ["--output_dir", str(out)]
    if name == "two-processes":
        import warm

        for process in warm.start_pair(ROOT / script, *argv, OMP_NUM_THREADS="1"):
            said = process.communicate()[1]
            if process.returncode:
                raise RuntimeError(said)
    elif script == FINE_TUNE:
        from bert_finetune.run_glue import main

        main(argv)
    else:
        from bert_emd.emd_task_distill import main

        main(argv)


def numbers(out: Path) -> dict:
    """What a run left in its folder, as a record has it."""
    from safetensors.numpy import load_file

    history = json.loads((out / "eval_results.json").read_text())["history"]
    record = {
        "losses": {key: [entry[key] for entry in history] for key in sorted(history[0]) if key.endswith("_loss")},
        "layers": {},
    }
    if (out / "flows.npz").exists():
        with np.load(out / "flows.npz") as arrays:
            kept = [key for key in sorted(arrays.files) if key.endswith(("_flow", "_weights"))]
            record["layers"] = {key: arrays[key].tolist() for key in kept}
    weights, digest = load_file(out / "model.safetensors"), hashlib.sha256()
    for key in sorted(weights):
        digest.update(key.encode() + weights[key].tobytes())
    record["norms"] = {key: float(np.linalg.norm(weights[key].astype(float))) for key in sorted(weights)}
    record["digest"] = digest.hexdigest()
    return record


def distance(record: dict, reference: dict) -> float:
    """The largest relative difference between two records' numbers. Raises AssertionError where other numbers are in
    them."""
    worst = 0.0
    # Flows and layer weights are shares of one: what little is left for a pair is rounded like the rest.
    for part, least in (("losses", 1e-3), ("layers", 1e-2), ("norms", 1e-3)):
        assert record[part].keys() == reference[part].keys(), (part, set(record[part]) ^ set(reference[part]))
        for key, wanted in reference[part].items():
            ours, theirs = np.array(record[part][key]), np.array(wanted)
            assert ours.shape == theirs.shape, (part, key, ours.shape, theirs.shape)
            worst = max(worst, float(np.max(np.abs(ours - theirs) / np.maximum(np.abs(theirs), least))))
    return worst


def read(name: str) -> dict:
    return json.loads((REFERENCE / f"{name}.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the records, and write none")
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"some of: {', '.join(RUNS)} (default: all)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        made = places(Path(place))
        for name in options.runs or RUNS:
            carry_out(name, made, Path(place, f"out-{name}"))
            record = numbers(Path(place, f"out-{name}"))
            if options.check:
                reference = read(name)
                same = record == reference
                print(f"{name}: {'the same to the bit' if same else f'off by {distance(record, reference):.1e}'}")
            else:
                (REFERENCE / f"{name}.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
                print(f"{name}: written")


if __name__ == "__main__":
    main()
