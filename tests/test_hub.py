"""The scripts with models by hub name, against a hub on this machine: the real scripts, in processes of their own."""

import itertools
import json
import os
import platform
import re
import sys
from pathlib import Path

import pytest
import torch
import warm
from conftest import ROOT, save_bert
from glue_files import write_task
from hub_server import TOKEN, HubModel, HubServer
from safetensors.torch import load_file
from transformers import AutoModel

pytestmark = [pytest.mark.training, pytest.mark.xdist_group("test_hub")]

RTE = ["entailment", "not_entailment"]


class World:
    """A hub, a folder to work in, and an empty local cache."""

    def __init__(self, folder: Path, hub: HubServer):
        self.folder, self.hub = folder, hub
        self.cache = folder / "hf_home"
        self.data = write_task(folder / "data", "RTE")
        self.online = self.server(HF_HUB_ETAG_TIMEOUT="4")

    def add(self, name: str, **properties) -> Path:
        """Put a tiny classifier for RTE on the hub; returns its folder there, to change it."""
        folder = save_bert(self.folder / "served" / name, RTE)
        self.hub.models[name] = HubModel(folder, **properties)
        return folder

    def finetune(self, model: str, out: str, *more) -> list[str]:
        return self._command("bert_finetune/run_glue.py", out, "--model_name_or_path", model, *more)

    def distil(self, teacher: str, student: str, out: str, *more) -> list[str]:
        models = "--teacher_model", teacher, "--student_model", student
        return self._command("bert_emd/emd_task_distill.py", out, *models, *more)

    def _command(self, script: str, out: str, *options) -> list[str]:
        task = "--task_name", "RTE", "--data_dir", self.data, "--max_seq_length", 32
        return [str(x) for x in (ROOT / script, *options, *task, "--output_dir", self.folder / out, "--use_cpu")]

    def server(self, **constants: str) -> warm.Server:
        """Starts scripts to which this is the hub; `constants` are what its library reads when it is imported."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        of_hub = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.cache), "NO_PROXY": "127.0.0.1,localhost"}
        return warm.Server({**inherited, "PYTHONPATH": str(ROOT), **of_hub, **constants})

    def run(self, *commands: list[str], by: warm.Server | None = None, **environment: str) -> list[tuple]:
        """(exit code, stdout, stderr) of each command; whatever is asked on the way is answered with yes."""
        done = []
        for command in commands:
            process = (by or self.online).start(*command, folder=self.folder, answers="y\n" * 100, **environment)
            out, err = process.communicate(timeout=600)
            done.append((process.returncode, out, err))
        return done


def pickled(folder: Path, weights: dict) -> None:
    """Give a model a pytorch_model.bin in place of its model.safetensors."""
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Payload:
    """What a harmful pickle holds: reading it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


CODE = {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"}


def add_good_models(world: World) -> None:
    """A pre-trained model in several files, a private teacher, and a student as general-distilled ones are published:
    a pytorch_model.bin with a projection to the teacher's width."""
    pretrained = world.add("org/pretrained")
    AutoModel.from_pretrained(pretrained).save_pretrained(pretrained, max_shard_size="40KB")
    (pretrained / "model.safetensors").unlink()
    world.hub.aliases["pretrained"] = "org/pretrained"
    world.add("org/teacher", private=True)
    student = save_bert(world.folder / "served/org/student", None, hidden_size=12, num_hidden_layers=2)
    projection = {"fit_dense.weight": torch.ones(24, 12), "fit_dense.bias": torch.zeros(24)}
    pickled(student, load_file(student / "model.safetensors") | projection)
    world.hub.models["org/student"] = HubModel(student)


def add_bad_models(world: World) -> None:
    world.add("org/private", private=True)
    world.add("org/gated", gated=True)
    world.add("org/broken", status=503)
    world.add("org/silent", pause=8)
    world.add("org/cut", cuts=[9000])
    damaged = world.add("org/damaged") / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:9000])
    (world.add("org/no-config") / "config.json").unlink()
    (world.add("org/no-weights") / "model.safetensors").unlink()
    (world.add("org/no-vocabulary") / "tokenizer.json").unlink()
    pickled(world.add("org/pickle"), {"classifier.bias": Payload(world.folder / "the pickle ran")})
    for name, changes in (
        ("org/code", {"model_type": "of-its-own", "auto_map": CODE}),
        ("org/code-not-needed", {"auto_map": CODE}),
        ("org/kernel", {"attn_implementation": "org/kernel-code"}),
    ):
        folder = world.add(name)
        change_json(folder / "config.json", **changes)
        (folder / "code.py").write_text(f"open({str(world.folder / 'the code ran')!r}, 'w')")
    tokenizer = world.add("org/code-of-tokenizer")
    change_json(
        tokenizer / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["code.T", None]}
    )
    (tokenizer / "code.py").write_text((folder / "code.py").read_text())
    world.add("org/folder")
    save_bert(world.folder / "org/folder", ["a", "b", "c"])


# Models that cannot be used, and what the one line says about them.
REFUSED = {
    "org/unknown": "neither a folder nor a model at {hub}; if it is private, set HF_TOKEN",
    "org/private": "neither a folder nor a model at {hub}; if it is private, set HF_TOKEN",
    "org/gated": "is gated: ask for access at {hub}/org/gated and set HF_TOKEN to a token of yours",
    "org/broken": "{hub} answered with HTTP status 503; try again later, or check HF_TOKEN and HF_ENDPOINT",
    "org/silent": "cannot be fetched from {hub} (ReadTimeout: timed out); try again, or check the network",
    "org/cut": "a file came incomplete from {hub}; try again",
    "org/damaged": "; if files in {cache}/models--org--damaged are damaged or missing, remove it and run this",
    "org/no-config": "has no config.json at {hub}, so it is no transformers model",
    "org/no-weights": "cannot be loaded: org/no-weights does not appear to have a file named pytorch_model.bin or",
    "org/no-vocabulary": "has no vocabulary; it needs a tokenizer.json or vocab.txt",
    "org/pickle": "cannot be loaded: its pytorch_model.bin is damaged, or holds code, which is never run here",
    "org/code": "cannot be loaded: needs code of its own, which is never run here; use an architecture of",
    "org/folder": "its 3 labels (a, b, c) do not fit RTE (entailment, not_entailment)",  # the folder's, not the hub's
    "not/a/name": "no such folder, and not a name on the hub (such as google-bert/bert-base-uncased)",
}
GOOD = ["org/cut", "org/code-not-needed", "org/kernel", "org/code-of-tokenizer"]  # org/cut comes whole now


# Pushes that are refused at the start, by what --push_to_hub comes with, the token, and the line that says why.
NO_WRITING = (
    "--push_to_hub: {hub} answered with HTTP status %s; 401 and 403 mean that HF_TOKEN is no token that may write"
)
PUSH_REFUSED = (
    (("--hub_model_id", "org/small"), "", NO_WRITING % 401),
    (("--hub_model_id", "org/teacher"), "hf_reader", NO_WRITING % 403),  # which is there, and may be read
    (("--hub_model_id", "no such name"), TOKEN, "--push_to_hub: not a name that the hub takes; give another as"),
    ((), TOKEN, "--push_to_hub: under which name? Give --hub_model_id"),
    (
        ("--hub_model_id", "x", "--hub_token", TOKEN),
        TOKEN,
        "--hub_token: the command is kept beside the model, for all to read; set HF_TOKEN",
    ),
    (("--hub_model_id", "x", "--hub_strategy", "every_save"), TOKEN, "--hub_strategy every_save: only the finished"),
)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory) -> dict:
    """Runs that send their model, and runs that cannot."""
    ran = {}
    with HubServer() as hub:
        world = ran["world"] = World(tmp_path_factory.mktemp("world"), hub)
        world.add("org/teacher")
        short = "--num_train_epochs", 1, "--train_batch_size", 8, "--push_to_hub"
        teacher = world.finetune("org/teacher", "finetuned", "--do_train", *short, "--hub_model_id", "finetuned")
        (world.folder / "student").mkdir()
        (world.folder / "student/notes.txt").write_text("nobody's business")
        name = "--hub_model_id", "org/small", "--hub_revision", "tried"
        student = world.distil("org/teacher", "org/teacher", "student", "--do_predict", "--do_train", *short, *name)
        ran["sent"] = world.run(teacher, student, HF_TOKEN=TOKEN)
        replacing = "--do_train", "--overwrite_output_dir", *short
        ran["refused"] = []
        for token, cases in itertools.groupby(PUSH_REFUSED, key=lambda case: case[1]):
            commands = [world.finetune("org/teacher", "finetuned", *replacing, *options) for options, *_ in cases]
            ran["refused"] += world.run(*commands, HF_TOKEN=token)
        hub.full = True
        late = world.finetune("org/teacher", "late", "--do_train", *short, "--hub_model_id", "late")
        ran["late"] = world.run(late, HF_TOKEN=TOKEN)[0]
        hub.full = False
        again = world.finetune(
            str(world.folder / "late"), "late", "--do_eval", "--push_to_hub", "--hub_model_id", "late"
        )
        nothing = world.finetune("org/teacher", "empty", "--do_eval", "--push_to_hub", "--hub_model_id", "empty")
        other = [*nothing[: nothing.index("--output_dir")], "--output_dir", str(world.folder / "late"), "--use_cpu"]
        other += ["--overwrite_output_dir"]
        where = "--task_name", "RTE", "--data_dir", world.data, "--max_seq_length", 32, "--max_drop", 100
        export = [ROOT / "deploy/export_student.py", "--model", "org/teacher", *where]
        ran["exported"] = world.run(list(map(str, [*export, "--output_dir", world.folder / "exported"])))[0]
        world.add("me/late")
        private = [*again, "--hub_private_repo", "True"]
        ran["again"], *ran["kept here"] = world.run(again, nothing, other, private, HF_TOKEN=TOKEN)
    return ran


def test_a_model_of_the_hub_is_exported(pushed):
    code, out, err = pushed["exported"]
    folder = pushed["world"].folder / "exported"
    assert code == 0 and f"exported into {folder}: config.json, export.json, model.onnx" in out, err


def test_a_finished_model_is_sent_with_its_card(pushed):
    (code, out, _), (student_code, student_out, student_err) = pushed["sent"]
    assert (code, student_code) == (0, 0), student_err
    world, hub = pushed["world"], pushed["world"].hub
    assert hub.created[:2] == ["me/finetuned", "org/small"]
    (first, branch, finetuned), (second, other_branch, student), *_ = hub.commits
    assert (first, branch, second, other_branch) == ("me/finetuned", "main", "org/small", "tried")
    assert f"sent to {hub.url}/me/finetuned/commit/" in out and f"sent to {hub.url}/org/small/commit/" in student_out
    for files, folder in ((finetuned, "finetuned"), (student, "student")):
        assert {"model.safetensors", "config.json", "tokenizer.json", "args.json", "README.md"} < set(files)
        for name, content in files.items():
            assert content == (world.folder / folder / name).read_bytes() or name == "args.json", name
            assert str(world.folder).encode() not in content and sys.prefix.encode() not in content, name
            # Weights hold any two letters somewhere, and a machine's name can be that short.
            assert platform.node().encode() not in content or name == "model.safetensors", name
        assert json.loads(files["args.json"])["options"]["output_dir"] == folder
        left = {path.name for path in (world.folder / folder).iterdir()} - {name.split("/")[0] for name in files}
        assert {re.sub(r"-\d+", "", name) for name in left} == {"checkpoint", "dev_predictions.npz", "runs"} | (
            {"notes.txt", "RTE.tsv"} if folder == "student" else set()
        )
    assert "flow.png" in student and 'model="org/small")' in student["README.md"].decode()


@pytest.mark.parametrize("case", range(len(PUSH_REFUSED)))
def test_a_push_that_cannot_be_is_refused_before_anything_is_done(pushed, case):
    message = PUSH_REFUSED[case][-1].format(hub=pushed["world"].hub.url)
    assert message in only_error(pushed["refused"][case])
    assert (pushed["world"].folder / "finetuned/model.safetensors").exists()  # of the run that was to be replaced


def test_a_push_that_fails_in_the_end_leaves_the_model(pushed):
    folder, hub = pushed["world"].folder / "late", pushed["world"].hub
    line = only_error(pushed["late"])
    assert (
        "HTTP status 403" in line
        and f"the model is in {folder}, and --do_eval --push_to_hub of that folder sends it" in line
    )
    assert (folder / "model.safetensors").exists() and (folder / "README.md").exists()
    assert pushed["again"][0] == 0, pushed["again"]
    name, _, files = hub.commits[2]
    assert name == "me/late" and files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_what_should_not_be_sent_stays_here(pushed):
    nothing, other, private = map(only_error, pushed["kept here"])
    folder = pushed["world"].folder
    # Without training, the model that is looked at must be the one that would be sent.
    for line, out in ((nothing, folder / "empty"), (other, folder / "late")):
        assert f"--push_to_hub: sends what is in --output_dir {out}, and not org/teacher, which is" in line
    assert "--hub_private_repo: me/late is there already, and public" in private
    assert len(pushed["world"].hub.commits) == 3 and "me/empty" not in pushed["world"].hub.created


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> dict:
    """Everything that is run, by name: the commands' results, and the requests that reached the hub meanwhile."""
    folder, ran = tmp_path_factory.mktemp("world"), {}
    with HubServer() as hub:
        world = ran["world"] = World(folder, hub)
        add_good_models(world)
        add_bad_models(world)

        def good(out: str) -> list[list[str]]:
            more = "--num_train_epochs", 1, "--train_batch_size", 8
            return [
                world.finetune("pretrained", f"{out}/finetuned", "--do_train", *more),
                world.distil("org/teacher", "org/student", f"{out}/student", *more),
            ]

        ran["first"] = world.run(*good("first"), HF_TOKEN=TOKEN)
        ran["first requests"] = list(hub.requests)
        hub.requests.clear()
        ran["second"] = world.run(*good("second"), HF_TOKEN=TOKEN)
        bad = [world.finetune(name, "bad", "--do_eval") for name in (*REFUSED, *GOOD)]
        bad += [world.distil("org/unknown", "org/student", "bad"), world.distil("org/cut", "org/unknown", "bad")]
        ran["tried"] = world.run(*bad)
        ran["second requests"] = [r for r in hub.requests if "/org/student/" in r[1] or "/org/pretrained/" in r[1]]
        ran["requests"] = ran["first requests"] + hub.requests
    # From here on nothing answers at the hub's address.
    unknown = world.finetune("org/unknown", "bad", "--do_eval")
    ran["down"] = world.run(*good("down"), unknown)
    ran["offline"] = world.run(*good("offline"), unknown, by=world.server(HF_HUB_OFFLINE="1"))
    return ran


def test_models_by_name(ran):
    assert [code for code, *_ in ran["first"]] == [0, 0], ran["first"]
    world = ran["world"]
    assert "new weights for classifier.bias" in ran["first"][0][1]
    for out in ("finetuned", "student"):
        assert (world.folder / "first" / out / "model.safetensors").exists()
    weights = {path for method, path in ran["first requests"] if method == "GET" and path.startswith("/cdn/")}
    assert {"/cdn/org/teacher/model.safetensors", "/cdn/org/student/pytorch_model.bin"} < weights
    assert sum(path.startswith("/cdn/org/pretrained/model-0000") for path in weights) > 1  # several files
    assert world.hub.tokens_to_cdn == 0
    for out, names in (("finetuned", {"pretrained"}), ("student", {"org/student", "org/teacher"})):
        used = json.loads((world.folder / "first" / out / "args.json").read_text())["commits"]
        served = {name: world.hub.models[world.hub.aliases.get(name, name)].commit for name in names}
        assert served.items() <= used.items()  # what this process took before is there too


@pytest.mark.parametrize("again", ["second", "offline", "down"])
def test_a_later_run_takes_the_cache_and_gives_the_same(ran, again):
    assert [code for code, *_ in ran[again][:2]] == [0, 0], ran[again]
    for out in ("finetuned", "student"):
        first, later = (ran["world"].folder / run / out / "model.safetensors" for run in ("first", again))
        assert first.read_bytes() == later.read_bytes()
    lines = [line for _, _, err in ran[again][:2] for line in err.splitlines() if "taken from the local cache" in line]
    assert [line.split(":")[1] for line in lines] == [
        f" {name} is taken from the local cache"
        for name in ("pretrained", "org/student", "org/teacher")
        if again == "down"
    ]
    assert all("cannot be fetched from http" in line for line in lines)


def test_the_second_run_fetches_nothing(ran):
    assert ran["second requests"]
    assert not [path for method, path in ran["second requests"] if method == "GET" and "/api/" not in path]


def only_error(result: tuple) -> str:
    code, _, err = result
    assert code == 2, result
    lines = [line for line in err.splitlines() if "error: " in line]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_used(ran, name):
    line = only_error(ran["tried"][list(REFUSED).index(name)])
    world = ran["world"]
    message = REFUSED[name].format(hub=world.hub.url, cache=world.cache / "hub")
    assert line.startswith(f"run_glue.py: error: --model_name_or_path {name}: ") and message in line


def test_teacher_and_student_are_named_in_errors(ran):
    teacher, student = map(only_error, ran["tried"][-2:])
    assert "emd_task_distill.py: error: --teacher_model org/unknown: neither a folder nor" in teacher
    assert "emd_task_distill.py: error: --student_model org/unknown: neither a folder nor" in student


def test_not_in_the_cache_and_no_hub(ran):
    world = ran["world"]
    line = only_error(ran["offline"][2])
    assert f"--model_name_or_path org/unknown: neither a folder nor in the local cache ({world.cache / 'hub'})" in line
    assert "unset HF_HUB_OFFLINE to fetch it" in line
    line = only_error(ran["down"][2])
    assert f"--model_name_or_path org/unknown: cannot be fetched from {world.hub.url} (" in line
    assert "try again, or check the network and HF_ENDPOINT" in line


@pytest.mark.parametrize("name", GOOD)
def test_a_model_that_can_be_used(ran, name):
    code, out, err = ran["tried"][len(REFUSED) + GOOD.index(name)]
    assert code == 0 and "dev: accuracy" in out, err


def test_no_code_of_a_model_is_run(ran):
    folder = ran["world"].folder
    assert not (folder / "the code ran").exists() and not (folder / "the pickle ran").exists()
    assert not [path for _, path in ran["requests"] if path.endswith(".py")]


def test_nothing_is_asked_beyond_the_models_files(ran):
    """Above all no conversion to safetensors, which starts with a look at a model's commits and discussions."""
    assert not [path for _, path in ran["requests"] if "/commits/" in path or "/discussions" in path]
    assert not [path for _, path in ran["requests"] if "org/folder" in path]


def test_the_cache_holds_nothing_incomplete(ran):
    world = ran["world"]
    assert not list(world.cache.rglob("*.incomplete"))
    for name, model in world.hub.models.items():
        for path in world.cache.glob(f"hub/models--{name.replace('/', '--')}/snapshots/*/*"):
            assert path.read_bytes() == model.files[path.name]
