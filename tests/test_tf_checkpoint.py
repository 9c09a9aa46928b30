"""The reader of TensorFlow checkpoints: exact on what TensorFlow wrote, an error on everything damaged or hostile."""

import random
import shutil
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tf_checkpoint_writer import block, entry, field, naive_crc32c, table, varint, write_checkpoint

from bert_finetune.errors import InputError
from bert_finetune.tf_checkpoint import MAX_INDEX_BYTES, ROW_WORDS, TFCheckpoint, crc32c

GOLDEN = Path(__file__).parent / "golden" / "tf_checkpoint"
VARIABLES = dict(np.load(GOLDEN / "vars.npz"))
INDEX = "bert_model.ckpt.index"
DATA = "bert_model.ckpt.data-00000-of-00001"

fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def copy(tmp_path) -> Path:
    for name in (INDEX, DATA):
        shutil.copyfile(GOLDEN / name, tmp_path / name)
    return tmp_path / "bert_model.ckpt"


def read_all(prefix: Path) -> dict[str, np.ndarray]:
    checkpoint = TFCheckpoint(prefix)
    return {name: checkpoint.read(name) for name in checkpoint.variables}


def assert_same(values: dict[str, np.ndarray], expected: dict[str, np.ndarray] = VARIABLES):
    assert list(values) == sorted(expected)
    for name, array in expected.items():
        assert values[name].dtype == array.dtype
        np.testing.assert_array_equal(values[name], array, err_msg=name, strict=True)


def survives(prefix: Path) -> bool:
    """Whether the checkpoint can be read; then it has to give exactly the right values."""
    try:
        values = read_all(prefix)
    except InputError as error:
        assert "\n" not in str(error) and str(prefix) in str(error)
        return False
    assert_same(values)
    return True


def reads_or_refuses(prefix: Path) -> None:
    """Whatever the index holds, nothing but an `InputError` comes out."""
    try:
        checkpoint = TFCheckpoint(prefix)
    except InputError:
        return
    for name in checkpoint.variables:
        try:
            checkpoint.read(name)
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "data, crc",
    [  # RFC 3720, appendix B.4, and the check value of the CRC catalogues
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_crc32c_known_values(data, crc):
    assert crc32c(data) == naive_crc32c(data) == crc


@pytest.mark.parametrize("size", [4 * ROW_WORDS * rows + extra for rows in (1, 2, 5) for extra in (-1, 0, 1, 2, 3, 4)])
def test_crc32c_at_the_edges_of_its_rows(size):
    data = np.random.default_rng(size).bytes(size)
    assert crc32c(data) == crc32c(bytearray(data)) == naive_crc32c(data)


@given(st.binary(max_size=300))
@fuzz
def test_crc32c_against_the_naive_loop(data):
    assert crc32c(data) == naive_crc32c(data)


def test_crc32c_is_fast_enough_for_bert():
    data = bytes(32 << 20)
    start = time.perf_counter()
    crc32c(data)
    assert time.perf_counter() - start < 32 / 440 * 60, "a minute for BERT-base's 440 MB"


def test_golden_checkpoint_is_read_exactly():
    assert_same(read_all(GOLDEN / "bert_model.ckpt"))


def test_values_are_writable():
    assert TFCheckpoint(GOLDEN / "bert_model.ckpt").read("bert/pooler/dense/bias").flags.writeable


def test_the_writer_writes_what_tensorflow_wrote(tmp_path):
    write_checkpoint(tmp_path / "bert_model.ckpt", VARIABLES)
    assert (tmp_path / INDEX).read_bytes() == (GOLDEN / INDEX).read_bytes()
    assert (tmp_path / DATA).read_bytes() == (GOLDEN / DATA).read_bytes()


@pytest.mark.parametrize("shards, pairs_per_block", [(1, 5), (2, 1000), (3, 1), (7, 16)])
def test_shards_and_blocks(tmp_path, shards, pairs_per_block):
    assert_same(read_all(write_checkpoint(tmp_path / "model", VARIABLES, shards, pairs_per_block)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "int64", "bool"])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)])
def test_types_and_shapes(tmp_path, dtype, shape):
    values = {"a/b": (np.random.default_rng(0).normal(size=shape) * 3).astype(dtype)}
    assert_same(read_all(write_checkpoint(tmp_path / "model", values)), values)


def test_bfloat16_is_widened_exactly(tmp_path):
    stored = np.arange(2**16, dtype=np.uint16).reshape(2, -1)
    values = read_all(write_checkpoint(tmp_path / "model", {"v": stored}, append={"v": field(1, 14)}))["v"]
    assert values.dtype == np.float32 and values.shape == stored.shape
    np.testing.assert_array_equal(values.view(np.uint32), stored.astype(np.uint32) << 16)


def test_unknown_fields_are_skipped(tmp_path):
    unknown = field(99, 5) + field(100, b"text") + varint(101 << 3 | 1) + bytes(8) + varint(102 << 3 | 5) + bytes(4)
    name = "bert/pooler/dense/bias"
    assert_same(read_all(write_checkpoint(tmp_path / "model", VARIABLES, append={"": unknown, name: unknown})))


@pytest.mark.slow
def test_every_flipped_byte_of_the_index(copy):
    index = copy.with_name(INDEX)
    whole, chance = index.read_bytes(), random.Random(0)
    survivors = []
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= chance.randrange(1, 256)
        index.write_bytes(damaged)
        if survives(copy):
            survivors.append(position)
    # Only the footer's padding, between the handles and the magic number, carries nothing.
    assert survivors == [position for position in range(len(whole) - 48, len(whole) - 8) if whole[position] == 0]


@pytest.mark.slow
def test_flipped_bytes_of_the_data(copy):
    checkpoint, chance = TFCheckpoint(copy), random.Random(0)
    with open(copy.with_name(DATA), "r+b", buffering=0) as file:
        for name, variable in checkpoint.variables.items():
            last = variable.offset + variable.size - 1
            for position in {variable.offset, last, *range(variable.offset, last, 11)}:
                file.seek(position)
                (byte,) = file.read(1)
                file.seek(position)
                file.write(bytes([byte ^ chance.randrange(1, 256)]))
                with pytest.raises(InputError, match=rf"{DATA}: variable '{name}': .*checksum"):
                    checkpoint.read(name)
                file.seek(position)
                file.write(bytes([byte]))
    assert_same(read_all(copy))


@pytest.mark.slow
def test_every_truncation_of_the_index(copy):
    index = copy.with_name(INDEX)
    whole = index.read_bytes()
    for size in range(len(whole)):
        index.write_bytes(whole[:size])
        assert not survives(copy), size


@pytest.mark.slow
def test_every_truncation_of_the_data(copy):
    checkpoint = TFCheckpoint(copy)
    by_end = sorted(checkpoint.variables, key=lambda name: -checkpoint.variables[name].offset)
    with open(copy.with_name(DATA), "r+b") as file:
        for name in by_end:
            variable = checkpoint.variables[name]
            for size in range(variable.offset + variable.size - 1, variable.offset - 1, -1):
                file.truncate(size)
                with pytest.raises(InputError, match=f"variable '{name}': damaged, the file ends"):
                    checkpoint.read(name)


@given(data=st.binary(max_size=400), footer=st.booleans())
@fuzz
def test_fuzz_any_bytes_as_index(tmp_path, data, footer):
    (tmp_path / "model.index").write_bytes(data + table([])[-8:] * footer)
    with pytest.raises(InputError):
        TFCheckpoint(tmp_path / "model")


@given(blocks=st.lists(st.binary(max_size=120), max_size=3))
@fuzz
def test_fuzz_any_blocks_with_right_checksums(tmp_path, blocks):
    (tmp_path / "model.index").write_bytes(table(blocks))
    reads_or_refuses(tmp_path / "model")


@given(pairs=st.dictionaries(st.binary(max_size=20), st.binary(max_size=60), max_size=5))
@fuzz
def test_fuzz_any_messages(tmp_path, pairs):
    (tmp_path / "model.index").write_bytes(table([block(sorted({b"": field(1, 1), **pairs}.items()))]))
    reads_or_refuses(tmp_path / "model")


NUMBERS = st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1), st.sampled_from([2**31, 2**32, 2**62, 2**63]))


@pytest.mark.slow
@given(
    numbers=st.lists(st.tuples(st.integers(1, 8), NUMBERS), max_size=6),
    dims=st.lists(NUMBERS, max_size=40),
    data_size=st.integers(0, 64),
)
@fuzz
def test_fuzz_any_numbers_in_an_entry(tmp_path, numbers, dims, data_size):
    made = entry(1, tuple(dims), 0, 0, bytes(data_size)) + b"".join(field(*pair) for pair in numbers)
    (tmp_path / "model.index").write_bytes(table([block([(b"", field(1, 1)), (b"v", made)])]))
    (tmp_path / "model.data-00000-of-00001").write_bytes(bytes(64))
    reads_or_refuses(tmp_path / "model")


@given(changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4))
@fuzz
def test_fuzz_changed_index_with_right_checksums(copy, changes):
    contents = bytearray((GOLDEN / INDEX).read_bytes()[:1697])
    for position, value in changes:
        contents[position % len(contents)] = value
    copy.with_name(INDEX).write_bytes(table([bytes(contents)]))
    reads_or_refuses(copy)


NAME = "bert/pooler/dense/bias"


@pytest.mark.parametrize(
    "append, message",
    [
        ({"": field(2, 1)}, "big-endian"),
        ({"": field(3, field(2, 2))}, "newer format"),
        ({"": field(1, 2**31)}, "data-00000-of-2147483648: variable '.*No such file"),
        ({"": b"\x08\x00"}, "is in shard 0 of 0"),
        ({NAME: field(3, 1)}, f"'{NAME}' is in shard 1 of 1"),
        ({NAME: field(7, b"\x0a\x00")}, f"'{NAME}': is partitioned"),
        ({NAME: field(1, 7)}, f"'{NAME}': has the type number 7"),
        ({NAME: field(1, 2)}, "64 bytes do not fill its shape"),
        ({NAME: field(2, field(2, b"\x08\x00"))}, "64 bytes do not fill its shape"),
        ({NAME: field(2, field(2, field(1, 2**64 - 1)))}, "64 bytes do not fill its shape"),
        ({NAME: field(2, field(2, field(1, 1)) * 40)}, "41 dimensions"),
        ({NAME: b"\x28\x00" + field(2, field(2, b"\x08\x00"))}, f"'{NAME}': is empty"),
        ({NAME: field(4, 2**63)}, "the file ends before"),
        ({NAME: field(4, 2**62) + field(5, 2**60) + field(2, field(2, field(1, 2**54)))}, "the file ends before"),
        ({NAME: b"\x0b"}, "no known kind"),
        ({NAME: b"\x08" + b"\xff" * 10}, "too long"),
        ({NAME: b"\x12\x7f"}, "runs past its end"),
    ],
)
def test_refused_entries(tmp_path, append, message):
    tracemalloc.start()
    with pytest.raises(InputError, match=message):
        read_all(write_checkpoint(tmp_path / "model", VARIABLES, append=append))
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "blocks, message",
    [
        ([], "no header"),
        ([block([])], "no header"),
        ([block([(b"a", b"")])], "no header"),
        ([block([(b"", field(1, 1)), (b"b", b""), (b"a", b"")])], "out of order"),
        ([block([(b"", field(1, 1)), (b"a", b"")]), block([(b"a", b"")])], "out of order"),
        ([block([(b"", field(1, 1)), (b"\xff\xfe", b"")])], "not UTF-8"),
        ([block([(b"", field(1, 1)), (b"a" * 513, b"")])], "too long"),
        ([b"\x01\x00\x00" + block([])], "too long"),
        ([b"\xff" * 12], "list of restarts"),
        ([b""], "list of restarts"),
    ],
)
def test_refused_tables(tmp_path, blocks, message):
    (tmp_path / "model.index").write_bytes(table(blocks))
    with pytest.raises(InputError, match=message):
        TFCheckpoint(tmp_path / "model")


def test_parts_of_partitioned_variables_are_no_variables(tmp_path):
    pairs = [(b"", field(1, 1)), (b"\0\xffpart", b""), (b"v", entry(1, (1,), 0, 0, bytes(4)) + field(7, b""))]
    (tmp_path / "model.index").write_bytes(table([block(pairs)]))
    checkpoint = TFCheckpoint(tmp_path / "model")
    assert list(checkpoint.variables) == ["v"]
    with pytest.raises(InputError, match="'v': is partitioned"):
        checkpoint.read("v")


def test_compressed_index_is_refused(tmp_path):
    with pytest.raises(InputError, match="is compressed"):
        TFCheckpoint(write_checkpoint(tmp_path / "model", VARIABLES, compression=1))


def test_blocks_that_overlap_are_refused(tmp_path):
    """A small file whose index names one large block many times would cost its square."""
    header = block([(b"", field(1, 1))])
    handle = varint(0) + varint(len(header))
    forged_index = block([(b"a", handle), (b"b", handle)])
    forged = table([header, forged_index])
    place = varint(len(header) + 5) + varint(len(forged_index))
    (tmp_path / "model.index").write_bytes(forged[:-48] + (handle + place).ljust(40, b"\0") + forged[-8:])
    with pytest.raises(InputError, match="overlap"):
        TFCheckpoint(tmp_path / "model")


def test_oversized_index_is_refused(tmp_path):
    (tmp_path / "model.index").write_bytes(bytes(MAX_INDEX_BYTES + 1))
    with pytest.raises(InputError, match="too large"):
        TFCheckpoint(tmp_path / "model")


def test_densest_index_is_bounded(tmp_path):
    """Names of the greatest length that take seven bytes each in the file."""
    dense = block([(b"", field(1, 1)), (b"a" * 509 + bytes(3), b"")])[:-8]
    for number in range(1, 30_000):
        dense += varint(509) + b"\x03\x00" + bytes([number >> 14, number >> 7 & 127, number & 127])
    (tmp_path / "model.index").write_bytes(table([dense + block([])]))
    start = time.perf_counter()
    assert len(TFCheckpoint(tmp_path / "model").variables) == 30_000
    assert time.perf_counter() - start < 10


def test_missing_files_and_names(copy):
    with pytest.raises(InputError, match=r"nothing\.index: No such file"):
        TFCheckpoint(copy.with_name("nothing"))
    with pytest.raises(InputError, match="has no variable 'bert/nothing'"):
        TFCheckpoint(copy).read("bert/nothing")
    copy.with_name(DATA).unlink()
    with pytest.raises(InputError, match=f"{DATA}: variable '{NAME}': No such file"):
        TFCheckpoint(copy).read(NAME)
