"""The scripts with models by hub name, against a hub on this machine: the real scripts, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, save_bert
from glue_files import write_task
from hub_server import TOKEN, HubModel, HubServer
from safetensors.torch import load_file
from transformers import AutoModel

RTE = ["entailment", "not_entailment"]

# Runs scripts one after the other, since a process of its own for each would take long to start.
RUNNER = """
import contextlib, io, json, runpy, sys, traceback

for script, *argv in json.loads(sys.argv[1]):
    sys.argv, code, out, err = [script, *argv], 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = traceback.format_exc()
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


class World:
    """A hub, a folder to work in, and an empty local cache."""

    def __init__(self, folder: Path, hub: HubServer):
        self.folder, self.hub = folder, hub
        self.cache = folder / "hf_home"
        self.data = write_task(folder / "data", "RTE")

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

    def start(self, *commands: list[str], **environment: str) -> subprocess.Popen:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        of_hub = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.cache), "NO_PROXY": "127.0.0.1,localhost"}
        return subprocess.Popen(
            [sys.executable, "-c", RUNNER, json.dumps(commands)],
            cwd=self.folder,
            env={**inherited, "PYTHONPATH": str(ROOT), **of_hub, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def results(process: subprocess.Popen) -> list[tuple]:
    """(exit code, stdout, stderr) of each command; whatever is asked on the way is answered with yes."""
    out, err = process.communicate("y\n" * 100, timeout=600)
    assert process.returncode == 0 and "Traceback" not in err, err
    return [tuple(json.loads(line)) for line in out.splitlines()]


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


# Pushes that are refused, and what the one line says: options beside --push_to_hub, the token, and the message.
PUSH_REFUSED = (
    ((), "", "--push_to_hub: {hub} answered with HTTP status 401; HF_TOKEN must be a token that may write there"),
    (("--hub_token", TOKEN), TOKEN, "--hub_token: the command is kept beside the model, for all to read; set HF_TOKEN"),
    (("--hub_strategy", "every_save"), TOKEN, "--hub_strategy every_save: only the finished folder is sent"),
    (("--hub_model_id", "no such name"), TOKEN, "--push_to_hub: not a name that the hub takes; give another as"),
)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory) -> dict:
    """Runs that send their model, and runs that cannot, by name."""
    ran = {}
    with HubServer() as hub:
        world = ran["world"] = World(tmp_path_factory.mktemp("world"), hub)
        world.add("org/teacher")
        short = "--num_train_epochs", 1, "--train_batch_size", 8, "--push_to_hub"
        teacher = world.finetune("org/teacher", "finetuned", "--do_train", *short)
        (world.folder / "student").mkdir()
        (world.folder / "student/notes.txt").write_text("nobody's business")
        student = world.distil("org/teacher", "org/teacher", "student", *short)
        student += ["--hub_model_id", "org/small", "--hub_revision", "tried"]
        finished = world.finetune(str(world.folder / "finetuned"), "finetuned", "--do_eval", "--push_to_hub")
        ran["sent"] = results(world.start(teacher, student, finished, HF_TOKEN=TOKEN))
        for token in ("", TOKEN):
            refused = [
                world.finetune("org/teacher", f"refused-{k}", "--do_train", *short, *options)
                for k, (options, needs, _) in enumerate(PUSH_REFUSED)
                if needs == token
            ]
            ran[token] = results(world.start(*refused, HF_TOKEN=token))
        hub.full = True
        ran["full"] = results(world.start(world.finetune("org/teacher", "full", "--do_train", *short), HF_TOKEN=TOKEN))
    return ran


def test_a_finished_model_is_sent_with_its_card(pushed):
    (code, out, _), (student_code, student_out, student_err), _ = pushed["sent"]
    assert (code, student_code) == (0, 0), student_err
    world, hub = pushed["world"], pushed["world"].hub
    assert hub.created[:2] == ["me/finetuned", "org/small"]
    (first, revision, finetuned), (second, other_revision, student) = hub.commits
    assert (first, revision, second, other_revision) == ("me/finetuned", "main", "org/small", "tried")
    assert f"sent to {hub.url}/me/finetuned/commit/" in out and f"sent to {hub.url}/org/small/commit/" in student_out
    for files, folder in ((finetuned, "finetuned"), (student, "student")):
        assert {"model.safetensors", "config.json", "tokenizer.json", "args.json", "README.md"} < set(files)
        assert all(content == (world.folder / folder / name).read_bytes() for name, content in files.items())
        assert not [
            name for name in files if name.startswith("checkpoint-") or name in ("notes.txt", "training_args.bin")
        ]
        assert any(name.startswith("runs/") for name in files)
    assert "flow.png" in student and 'model="org/small"' in student["README.md"].decode()


def test_what_is_finished_is_not_sent_by_an_evaluation(pushed):
    line = only_error(pushed["sent"][2])
    assert f"--push_to_hub: `hf upload <name> {pushed['world'].folder / 'finetuned'}` sends a model that is" in line


@pytest.mark.parametrize("case", range(len(PUSH_REFUSED)))
def test_a_push_that_cannot_be_is_refused_at_the_start(pushed, case):
    _, token, message = PUSH_REFUSED[case]
    before = sum(needs == token for _, needs, _ in PUSH_REFUSED[:case])
    assert message.format(hub=pushed["world"].hub.url) in only_error(pushed[token][before])
    assert not (pushed["world"].folder / f"refused-{case}/model.safetensors").exists()


def test_a_push_that_fails_in_the_end_leaves_the_model(pushed):
    folder = pushed["world"].folder / "full"
    line = only_error(pushed["full"][0])
    assert "answered with HTTP status 403" in line and f"`hf upload me/full {folder}` sends it" in line
    assert (folder / "model.safetensors").exists() and (folder / "README.md").exists()


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

        ran["first"] = results(world.start(*good("first"), HF_TOKEN=TOKEN))
        ran["first requests"] = list(hub.requests)
        hub.requests.clear()
        second = world.start(*good("second"), HF_TOKEN=TOKEN)
        bad = [world.finetune(name, "bad", "--do_eval") for name in (*REFUSED, *GOOD)]
        bad += [world.distil("org/unknown", "org/student", "bad"), world.distil("org/cut", "org/unknown", "bad")]
        tried = world.start(*bad, HF_HUB_ETAG_TIMEOUT="4")
        ran["second"], ran["tried"] = results(second), results(tried)
        ran["second requests"] = [r for r in hub.requests if "/org/student/" in r[1] or "/org/pretrained/" in r[1]]
        ran["requests"] = ran["first requests"] + hub.requests
    # From here on nothing answers at the hub's address.
    unknown = world.finetune("org/unknown", "bad", "--do_eval")
    offline = world.start(*good("offline"), unknown, HF_HUB_OFFLINE="1")
    down = world.start(*good("down"), unknown)
    ran["offline"], ran["down"] = results(offline), results(down)
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
