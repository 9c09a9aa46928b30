"""One run of a suite: its command, and its record on disk."""

import datetime
import json
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from bert_finetune.errors import InputError
from bert_finetune.files import write_json

# In the place of a task, of runs that come before all tasks'; and their folder.
STEPS = "steps"

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class PlannedRun:
    """One call of a script: a step before all others, a task's teacher, which has a seed where each seed has one of its
    own, or a student.

    options: what the plan says of it. place: options that only say where things lie; the others, and its teacher's, are
    what a finished run is recognised by. folder: what it makes, a file where the script's option for it, `output`, is
    not "output_dir". needs: the other runs whose outcome it reads.
    """

    task: str
    size: str
    method: str
    seed: int | None
    script: str
    options: dict
    folder: Path
    place: dict = field(default_factory=dict)
    teacher: "PlannedRun | None" = None
    needs: tuple["PlannedRun", ...] = ()
    output: str = "output_dir"

    @property
    def is_teacher(self) -> bool:
        return self.method == "teacher"

    @property
    def is_step(self) -> bool:
        return self.task == STEPS

    @property
    def is_student(self) -> bool:
        return not (self.is_teacher or self.is_step)

    @property
    def waits_for(self) -> list["PlannedRun"]:
        """The runs that must be done before it."""
        return [*([self.teacher] if self.teacher else []), *self.needs]

    @property
    def follows(self) -> list["PlannedRun"]:
        """All runs but its teacher that its outcome depends on: what it needs, and what these need."""
        return [run for other in self.needs for run in (other, *other.follows)]

    @property
    def name(self) -> str:
        seed = None if self.seed is None else f"seed-{self.seed}"
        return "/".join(filter(None, (self.task, self.size, self.method, seed)))

    @property
    def command(self) -> list[str]:
        """The script and its arguments. A run that was stopped goes on from its last checkpoint."""
        path = ROOT / self.script
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        arguments = as_arguments(self.options | self.place | {self.output: str(self.folder)})
        # A script that writes a file goes on by itself; one that is there is of a suite that was killed just then.
        return [str(shown), *arguments, "--resume_from_checkpoint" if self.output == "output_dir" else "--overwrite"]

    @property
    def shown(self) -> str:
        """The command, ready to paste."""
        return shlex.join(["python", *self.command])

    @property
    def record_file(self) -> Path:
        return self.folder.with_name(self.folder.name + ".json")

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")

    def read_record(self) -> dict:
        """What is known of the run from before; empty for one that was never started."""
        try:
            return json.loads(self.record_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise InputError(f"{self.record_file}: not a record of a run; remove it") from error

    def write_record(self, state: str, **more) -> dict:
        """Write and return the record: what the run is, its `state` (running, stopped, done, failed, skipped), `more`.

        `seconds` are those of all starts that have ended, from `seconds_so_far`; `returncode` is negative for a run
        that a signal killed.
        """
        what = {key: getattr(self, key) for key in ("task", "size", "method", "seed", "options")}
        if self.teacher:
            what["teacher_options"] = self.teacher.options
        if self.needs:
            what["needs"] = {run.name: run.options for run in self.follows}
        record = {**what, "command": self.shown, "state": state, **more}
        self.record_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.record_file, record)
        return record

    def remove_checkpoints(self) -> None:
        """With the optimiser's state, each is as large as three models; the best of them is in the folder itself."""
        for checkpoint in self.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)

    def seconds_so_far(self) -> float:
        """What the starts of this run took; one that nobody saw the end of counts up to its last line in the log."""
        record = self.read_record()
        if self.output == "output_dir" and not self.folder.exists():  # removed, to run it anew
            return 0
        seconds = record.get("seconds", 0)
        if record.get("state") == "running" and self.log.exists():
            begun = datetime.datetime.fromisoformat(record["started"]).timestamp()
            seconds += max(0, self.log.stat().st_mtime - begun)
        return round(seconds, 1)

    def is_done(self) -> bool:
        made = self.folder / "eval_results.json" if self.output == "output_dir" else self.folder
        return self.read_record().get("state") == "done" and made.exists()

    def write_stopped(self) -> None:
        """Say in the record that the run was stopped, where it says that it is running."""
        record = self.read_record()
        if record.get("state") == "running":
            self.write_record("stopped", started=record["started"], seconds=self.seconds_so_far())


def as_arguments(options: dict) -> list[str]:
    """Options as a plan writes them -> arguments: lists become `a,b`, true and false `True` and `False`."""
    arguments = []
    for name, value in options.items():
        arguments += [f"--{name}", as_text(value)]
    return arguments


def as_text(value) -> str:
    """An option's value on the command line."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
