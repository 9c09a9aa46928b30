"""README and docs say what is there: paths, commands, options, links; and what they show as code runs."""

import ast
import importlib
import inspect
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from bert_emd.layer_outputs import LayerOutputs
from bert_emd.layer_transport import LayerTransport
from bert_emd.mappings import MAPPINGS
from bert_emd.objectives import LayerCosts
from bert_finetune.task_kinds import TaskKind

README, ARCHITECTURE = ROOT / "README.md", ROOT / "docs" / "architecture.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("bert_finetune", "bert_emd", "experiments", "deploy")
DISTIL = "bert_emd/emd_task_distill.py"
SCRIPTS = [
    DISTIL,
    "bert_emd/general_distill.py",
    "bert_emd/augment_data.py",
    "bert_finetune/run_glue.py",
    "bert_finetune/submission.py",
    "bert_finetune/convert_bert_original_tf_checkpoint_to_pytorch.py",
    "experiments/run_suite.py",
    "experiments/compare_results.py",
    "experiments/split_data.py",
    "deploy/export_student.py",
    "deploy/classify.py",
    "deploy/measure.py",
    "deploy/serve.py",
    "download_glue_data.py",
    "quickstart.py",
    "bert_emd/teacher_cache.py",
    "benchmarks/load.py",
    "benchmarks/augmentation.py",
]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page: language ("" for commands and drawings) and content."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def snippets(page: Path) -> list[str]:
    return [content for language, content in blocks(page) if language == "python"]


def commands(page: Path) -> list[list[str]]:
    """Every command of a page that starts Python, in a block or within a line, as words."""
    shown = [line for language, text in blocks(page) if not language for line in text.replace("\\\n", " ").split("\n")]
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    shown += re.findall(r"`([^`]+)`", prose.replace("\n", " "))
    words = (shlex.split(line.partition(" #")[0].removesuffix(" ...")) for line in shown if "'" not in line)
    return [line for line in words if line and line[0] in ("python", "torchrun") and len(line) > 1]


def own_files(page: Path) -> set[str]:
    """The files that a page tells the reader to write: their name is the first line."""
    return {found[1] for code in snippets(page) if (found := re.match(r"# (\w+\.py)\n", code))}


@pytest.fixture(scope="module")
def options_of():
    """A script's path -> all options that its --help lists."""
    known = {}

    def options(script: str) -> set[str]:
        if script not in known:
            shown = []
            main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
            with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match=r"^0$"):
                patch.setattr("sys.argv", [script, "--help"])
                patch.setattr("sys.stdout.write", shown.append)
                main()
            rows = [line for line in "".join(shown).splitlines() if re.match(r" +-", line)]
            known[script] = {option for row in rows for option in re.findall(r"(?<!\S)--?[\w-]+", row)}
        return known[script]

    return options


@each_page
def test_commands_name_scripts_and_options_that_exist(page, options_of):
    for line in commands(page):
        start, *words = line
        if start == "torchrun":
            assert words[0] == "--nproc_per_node"
            words = words[2:]
        if words[0] == "-m":
            words = [words[1].replace(".", "/") + ".py", *words[2:]]
        script, *given = words
        assert script in own_files(page) or (ROOT / script).is_file(), line
        known = options_of(DISTIL if script in own_files(page) else script)
        assert {word for word in given if re.match(r"--?[a-zA-Z]", word)} <= known, line


@each_page
def test_options_named_in_prose_exist(page, options_of):
    known = set().union(*map(options_of, SCRIPTS)) | {"--nproc_per_node", "--address"}
    theirs = {"--pkd", "--use_emd", "--json"}  # the authors', and curl's
    assert set(re.findall(r"(?<![\w-])--[a-zA-Z]\w*", page.read_text(encoding="utf-8"))) <= known | theirs


@each_page
def test_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    there = [path.relative_to(ROOT).as_posix() for pattern in ("*", "*/*") for path in ROOT.glob(pattern)]
    for name in set(re.findall(r"(?<![\w/.-])(?:[\w-]+/)*[\w-]+\.(?:py|toml|cff|md|csv)\b", text)) - own_files(page):
        if name.partition("/")[0] in (*PACKAGES, "tests", "plans", "docs", "results", "benchmarks"):
            assert name in there, name
        elif name.endswith(".py"):
            assert any(f"/{path}".endswith(f"/{name}") for path in there), name


@each_page
def test_make_targets_exist(page):
    named = re.findall(r"(?:^|`)make (\w+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@each_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        path, _, part = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if part:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert part in {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}, link


@each_page
def test_code_compiles(page):
    for code in snippets(page):
        ast.parse(code)


def test_pages_are_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 180
    assert len(ARCHITECTURE.read_text(encoding="utf-8").splitlines()) <= 120
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 30


def test_every_page_says_first_what_it_is_for():
    for page in (ROOT / "docs").glob("*.md"):
        title, blank, first = page.read_text(encoding="utf-8").split("\n")[:3]
        assert title.startswith("# ") and not blank and first.startswith("This page "), page
        assert f"docs/{page.name}" in README.read_text(encoding="utf-8"), page


def test_the_tree_names_every_module():
    tree = README.read_text(encoding="utf-8").partition("## Where everything lies")[2]
    modules = {path.name for folder in PACKAGES for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    assert {name for name in modules if not re.search(rf"(?<!\w){re.escape(name)}", tree)} == set()


def test_old_names_are_gone():
    moved = (
        "run_suite compare_results suite_plan suite_runs runs result_tables significance comparison report published"
    )
    gone = {"bert_emd": moved.split(), "bert_finetune": ["metrics", "predictions", "trainer"]}
    old = "|".join(rf"{folder}[/.]({'|'.join(names)})\b" for folder, names in gone.items())
    old = re.compile(rf"cd \.\./|cd bert_\w+|{old}")
    kept = [*PAGES, *(path for folder in ("plans", "results") for path in (ROOT / folder).rglob("*.*"))]
    texts = {path: path.read_text(encoding="utf-8") for path in kept if path.suffix not in (".png", ".svg", ".npz")}
    assert {path.name: found[0] for path, text in texts.items() if (found := old.search(text))} == {}


def test_the_page_names_all_that_a_kind_of_task_writes():
    page = ARCHITECTURE.read_text(encoding="utf-8").partition("## Add a kind of task")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", page)) - {"TaskKind"}
    assert named == TaskKind.__abstractmethods__ | set(inspect.get_annotations(TaskKind))


def test_names_of_the_code_exist():
    """What docs/architecture.md names in backticks is defined somewhere."""
    modules = [path for folder in PACKAGES for path in (ROOT / folder).glob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in modules)
    defined = {
        name for pair in re.findall(r"(?:def|class) (\w+)|^ *(\w+)(?:: | = )", source, re.MULTILINE) for name in pair
    }
    named = re.findall(r"`([A-Za-z_]\w*(?:\.\w+)*)`", ARCHITECTURE.read_text(encoding="utf-8"))
    words = {word for name in named if not name.endswith(".py") for word in name.split(".")}
    assert words <= defined | {path.stem for path in modules} | {*PACKAGES}


def test_recipes_name_at_most_two_source_files():
    recipes = re.split(r"^## Add ", ARCHITECTURE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(recipes) == 5
    for recipe in recipes:
        prose = re.sub(r"^```.*?^```$", "", recipe, flags=re.MULTILINE | re.DOTALL)
        assert 1 <= len(set(re.findall(r"\]\(\.\./(\w+/\w+\.py)\)", prose))) <= 2, recipe


@pytest.fixture
def mappings_as_they_were():
    before = dict(MAPPINGS)
    yield
    MAPPINGS.clear()
    MAPPINGS.update(before)


@pytest.mark.training
def test_the_layer_mapping_of_the_page_runs(mappings_as_they_were, teacher, small_student, glue_dir, tmp_path):
    code, _ = snippets(ARCHITECTURE)
    page = {"__name__": "soft_mapping"}
    exec(code, page)
    cost = torch.tensor([[3.0, 1.0, 2.0], [5.0, 6.0, 4.0]], requires_grad=True)
    flow = page["SoftMapping"]()(hidden=cost).hidden_flow
    np.testing.assert_allclose(flow, torch.softmax(-cost.detach() / 3.5, dim=1) / 2, rtol=1e-6)
    page["main"](
        f"""
        --teacher_model {teacher} --student_model {small_student} --task_name RTE --data_dir {glue_dir / "RTE"}
        --layer_mapping soft --beta 1 --max_steps 2 --logging_steps 1 --max_seq_length 32 --train_batch_size 8
        --no_cuda --output_dir {tmp_path / "out"}
        """.split()
    )
    with np.load(tmp_path / "out" / "flows.npz") as flows:
        assert flows["hidden_flow"].shape == (2, 2, 4)
        np.testing.assert_allclose(flows["hidden_flow"].sum(axis=-1), 0.5, rtol=1e-6)
        assert flows["hidden_flow"].min() > 0


def test_the_layer_cost_of_the_page_runs():
    _, code = snippets(ARCHITECTURE)
    page = {}
    exec(code, page)
    torch.manual_seed(0)
    student = torch.randn(3, 2, 5, 6, requires_grad=True)
    teacher = torch.randn(4, 2, 5, 6)
    scores = [torch.randn(layers, 2, 3, 5, 5) for layers in (2, 3)]
    mask = torch.tensor([[1] * 5, [1] * 2 + [0] * 3])
    outputs = [
        LayerOutputs(torch.randn(2, 2), tuple(states), tuple(score))
        for states, score in zip((student, teacher), scores, strict=True)
    ]
    objective, mapping = page["objective"], LayerTransport(2, 3)
    loss, terms, matching = objective(mapping, *outputs, mask, torch.tensor([0, 1]))
    loss.backward()
    real = mask.bool()
    cosines = [
        [torch.cosine_similarity(student[i][real], teacher[j][real], dim=-1).mean() for j in (1, 2, 3)] for i in (1, 2)
    ]
    by_hand = sum(matching.hidden_flow[i, j] * (1 - cosines[i][j].item()) for i in range(2) for j in range(3))
    assert terms["hidden_loss"].item() == pytest.approx(by_hand, rel=1e-5)
    embedding = 1 - torch.cosine_similarity(student[0][real], teacher[0][real], dim=-1).mean()
    assert terms["embedding_loss"].item() == pytest.approx(embedding.item(), rel=1e-5)
    assert student.grad[:, 0].abs().min() > 0 and student.grad[:, 1, 2:].abs().max() == 0
    costs = LayerCosts().hidden(student[1:], teacher[1:], mask)
    assert terms["hidden_loss"].item() != pytest.approx((matching.hidden_flow * costs.detach().numpy()).sum(), rel=1e-2)


def test_the_pieces_of_the_page_of_equations_run(capsys):
    (code,) = snippets(ROOT / "docs" / "fidelity.md")
    page = {}
    exec(code, page)
    assert page["result"].hidden_flow.shape == (3, 6)
    assert all(layer.grad is not None for layer in page["student"])
    assert len(capsys.readouterr().out.splitlines()) >= 3
