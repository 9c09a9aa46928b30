import re
import struct

import numpy as np
import pytest
import torch
from drawn import assert_apart, texts
from matplotlib.image import imread
from tensorboardX.proto.event_pb2 import Event

from bert_emd.emd_task_distill import main
from bert_emd.history import LayerHistory
from bert_emd.layer_transport import LayerTransport
from bert_emd.pictures import draw_flow, draw_flow_over_training, draw_layer_weights

SHAPES = [(1, 1), (3, 6), (12, 24)]
NAMES = ["flow", "flow_over_training", "layer_weights"]


def a_run(folder, layers=(2, 3), records=4, branches=("attention", "hidden"), **options):
    """A folder with the flows and layer weights of so many records, 10 steps each but for the last one's 5."""
    generator = torch.Generator().manual_seed(0)
    transport, history = LayerTransport(*layers, **options), LayerHistory()
    for record in range(records):
        costs = {branch: 0.1 + torch.rand(*layers, generator=generator) for branch in branches}
        history.add(transport(**costs), transport)
        history.record(10 * (record + 1) - 5 * (record == records - 1))
    folder.mkdir(exist_ok=True)
    history.save(folder)
    return folder


def arrays(run):
    with np.load(run / "flows.npz") as found:
        return {name: found[name] for name in found.files}


@pytest.mark.slow
@pytest.mark.parametrize("layers", SHAPES, ids=str)
def test_files(layers, tmp_path):
    run = a_run(tmp_path / "run", layers)
    for draw in (draw_flow, draw_flow_over_training, draw_layer_weights):
        path = tmp_path / "a.name.with.dots"
        width, height = draw(run, path).get_size_inches()
        assert max(width, height) <= 9.8  # a page
        assert (tmp_path / f"{path}.png").read_bytes().startswith(b"\x89PNG")
        pixels = imread(f"{path}.png")[..., :3]
        assert (pixels == pixels[..., :1]).all()  # grey
        assert pixels.min() < 0.1 and pixels.max() == 1
        said = texts(f"{path}.svg")
        assert {"teacher layer", "teacher layers", "teacher layer, by student layer"} & set(said)
        assert str(min(layers[1], 20)) in said or draw is draw_flow_over_training
        sizes = re.findall(r"font(?:-size)?: (?:\w+ )*?([\d.]+)px", (tmp_path / f"{path}.svg").read_text())
        assert sizes and min(map(float, sizes)) >= 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.name.with.dots.png", "a.name.with.dots.svg", "run"]


@pytest.mark.slow
def test_a_picture_is_the_same_each_time(tmp_path):
    run = a_run(tmp_path / "run")
    for name in ("a", "b"):
        draw_flow_over_training(run, tmp_path / name)
    assert (tmp_path / "a.svg").read_text() == (tmp_path / "b.svg").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("layers", SHAPES, ids=str)
def test_the_flow_is_the_steps_average(layers, tmp_path):
    run = a_run(tmp_path / "run", layers)
    for axis, branch in zip(draw_flow(run, tmp_path / "flow").axes, ("attention", "hidden"), strict=False):
        expected = 100 * np.average(arrays(run)[f"{branch}_flow"], axis=0, weights=[10, 10, 10, 5])
        np.testing.assert_allclose(axis.images[0].get_array(), expected)
        shown = {tuple(map(int, text.get_position()[::-1])): text.get_text() for text in axis.texts}
        assert shown == {at: f"{share:.0f}" for at, share in np.ndenumerate(expected) if share >= 0.5}
        assert axis.get_title() == {"attention": "attention scores", "hidden": "hidden states"}[branch]


@pytest.mark.slow
@pytest.mark.parametrize("layers", SHAPES, ids=str)
def test_the_flow_over_training(layers, tmp_path):
    m, n = layers
    run = a_run(tmp_path / "run", layers)
    figure = draw_flow_over_training(run, tmp_path / "flow")
    for axis, branch in zip(figure.axes, ("attention", "hidden"), strict=False):
        (mesh,) = [item for item in axis.collections if hasattr(item, "get_coordinates")]
        drawn = np.ma.filled(mesh.get_array(), np.nan)
        expected = 100 * arrays(run)[f"{branch}_flow"]
        for i in range(m):
            np.testing.assert_allclose(drawn[i * (n + 1) : i * (n + 1) + n].T, expected[:, i], atol=1e-9)
        np.testing.assert_array_equal(mesh.get_coordinates()[0, :, 0], [0, 10, 20, 30, 35])
    assert {f"student {i + 1}" for i in range(m)} <= set(texts(tmp_path / "flow.svg"))
    # Each row's number is that of its teacher layer.
    rows = zip(figure.axes[0].get_yticks(minor=True), figure.axes[0].get_yticklabels(minor=True), strict=True)
    assert all(int(label.get_text()) == int(row) % (n + 1) + 1 for row, label in rows)


@pytest.mark.slow
def test_a_long_run_is_drawn_in_fewer_intervals(tmp_path):
    run = a_run(tmp_path / "run", records=1001)
    (mesh, *_) = draw_flow_over_training(run, tmp_path / "flow").axes[0].collections
    drawn, edges = np.ma.filled(mesh.get_array(), 0), mesh.get_coordinates()[0, :, 0]
    assert drawn.shape == (7, 200) and edges[0] == 0 and edges[-1] == 10005
    whole = np.average(100 * arrays(run)["attention_flow"], axis=0, weights=[10] * 1000 + [5])
    np.testing.assert_allclose(np.average(drawn[:3], axis=1, weights=np.diff(edges)), whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("merged", [True, False])
def test_layer_weights(merged, tmp_path):
    run = a_run(tmp_path / "run", (3, 6), merge_weights=merged)
    axes = draw_layer_weights(run, tmp_path / "weights").axes
    panels = [(branch, side) for branch in ("attention", "hidden")[: 2 - merged] for side in ("student", "teacher")]
    for axis, (branch, side) in zip(axes, panels, strict=True):
        weights = 100 * arrays(run)[f"{branch}_{side}_weights"]
        assert axis.get_title().startswith(f"{side} layers") and (", " in axis.get_title()) != merged
        looks = set()
        for line, name, values in zip(axis.lines, axis.texts, weights.T, strict=True):
            np.testing.assert_array_equal(line.get_xdata(), [0, 10, 20, 30, 35])
            np.testing.assert_allclose(line.get_ydata(), [100 / weights.shape[1], *values])
            assert name.xy == (35, values[-1])
            looks.add((line.get_linestyle(), line.get_color()))
        assert len(looks) == weights.shape[1]
        assert [name.get_text() for name in axis.texts] == [str(k + 1) for k in range(weights.shape[1])]


@pytest.mark.slow
@pytest.mark.parametrize("layers", SHAPES, ids=str)
def test_names_of_layers_do_not_cover_each_other(layers, tmp_path):
    for axis in draw_layer_weights(a_run(tmp_path / "run", layers), tmp_path / "weights").axes:
        assert_apart(axis)


@pytest.mark.slow
def test_one_branch_and_no_weights(tmp_path):
    hidden = a_run(tmp_path / "hidden", branches=["hidden"])
    assert [axis.get_title() for axis in draw_layer_weights(hidden, tmp_path / "a").axes] == [
        "student layers, hidden states",
        "teacher layers, hidden states",
    ]
    for draw in (draw_flow, draw_flow_over_training):
        assert [axis.get_title() for axis in draw(hidden, tmp_path / "a").axes] == ["hidden states", ""]
    fixed = tmp_path / "fixed"
    fixed.mkdir()
    np.savez(fixed / "flows.npz", steps=[10], hidden_flow=np.full((1, 2, 3), 1 / 6))
    assert draw_layer_weights(fixed, tmp_path / "b") is None and not list(tmp_path.glob("b.*"))


def events_in(log_folder):
    """All TensorBoard events of a folder."""
    for path in log_folder.rglob("events.out.tfevents.*"):
        data = path.read_bytes()
        while data:
            # A record: its length, a checksum, the event, a checksum.
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def images_in(log_folder):
    """Names and sizes of the pictures in a folder's TensorBoard events."""
    values = [value for event in events_in(log_folder) for value in event.summary.value if value.HasField("image")]
    return {value.tag: (value.image.width, value.image.height) for value in values}


@pytest.mark.training
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], NAMES),
        (["--layer_mapping", "uniform"], NAMES[:2]),
        (["--layer_mapping", "none"], []),
        (["--report_to", "none"], NAMES),
    ],
    ids=" ".join,
)
def test_a_run_draws_its_own(options, names, teacher, glue_dir, tmp_path):
    out = tmp_path / "out"
    command = [
        *("--teacher_model", teacher, "--student_layers", 2, "--task_name", "RTE", "--data_dir", glue_dir),
        *("--output_dir", out, "--max_seq_length", 32, "--num_train_epochs", 1, "--train_batch_size", 8, "--no_cuda"),
    ]
    main([str(argument) for argument in (*command, *options)])
    drawn = {path.stem for path in out.glob("*.png")}
    assert drawn == {path.stem for path in out.glob("*.svg")} == set(names)
    sizes = {name: imread(out / f"{name}.png").shape[1::-1] for name in names}
    assert images_in(out) == ({} if "--report_to" in options else sizes)
    if not options:
        main([str(argument) for argument in (*command, "--overwrite_output_dir", "--layer_mapping", "none")])
        assert not [*out.glob("*.png"), *out.glob("*.svg")] and not images_in(out)
