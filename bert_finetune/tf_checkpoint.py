"""Read the variables of a TensorFlow checkpoint (format V2, the "tensor bundle") without TensorFlow.

    checkpoint = TFCheckpoint("uncased_L-12_H-768_A-12/bert_model.ckpt")
    checkpoint.variables["bert/pooler/dense/bias"].shape  # (768,)
    checkpoint.read("bert/pooler/dense/bias")  # numpy array

A checkpoint is an index and one or more data files ("shards"):

- `PREFIX.index` is a sorted table in LevelDB's format: blocks of (key, value) pairs, an index block with the place of
  each, a footer with the place of the index block. The key is the variable's name, the value a protocol buffer with its
  type, shape and place; the empty key holds the header.
- `PREFIX.data-00000-of-00001` holds the values, one variable after the other.

Each block and each variable carries a CRC-32C, and all are verified: a damaged file raises `InputError` and never
gives wrong values. All sizes are checked against the file before anything of that size is allocated.

Sources, in TensorFlow's repository: tensorflow/core/util/tensor_bundle/tensor_bundle.h (the files),
core/protobuf/tensor_bundle.proto, core/framework/{types,tensor_shape,versions}.proto (the messages),
core/lib/io/table_format.txt (the table), core/lib/hash/crc32c.h (the masked checksum).
"""

import functools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bert_finetune.errors import InputError

FOOTER_SIZE = 48
TABLE_MAGIC = 0xDB4775248B80FB57
BUNDLE_VERSION = 1

# Bounds on what a table may ask of us. BERT-large with its optimizer's variables has an index of 0.1 MB.
MAX_INDEX_BYTES = 1 << 20
MAX_KEY_BYTES = 512
MAX_RANK = 32

# Numbers of types.proto: our name for the type, and how numpy reads the stored bytes. numpy has no bfloat16.
DTYPES = {
    1: ("float32", "<f4"),
    2: ("float64", "<f8"),
    3: ("int32", "<i4"),
    9: ("int64", "<i8"),
    10: ("bool", "?"),
    14: ("bfloat16", "<u2"),
    19: ("float16", "<f2"),
}
STORED_AS = dict(DTYPES.values())


class _Unreadable(Exception):
    """Why a file cannot be read; `_naming` adds which file."""


def _damaged(what: str) -> _Unreadable:
    return _Unreadable(f"damaged, {what}: fetch the checkpoint again")


@contextmanager
def _naming(path: Path, variable: str = ""):
    try:
        yield
    except (_Unreadable, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        advice = ": is the checkpoint complete?" if isinstance(error, FileNotFoundError) else ""
        raise InputError(f"{path}: {variable}{reason}{advice}") from error


# CRC-32C. A checksum is a polynomial over GF(2) modulo the Castagnoli polynomial, its bits reflected: bit 31 is x^0.
# It is linear, so 4096 words are folded at once: appending n bytes to a message multiplies its remainder by x^(8n).
CASTAGNOLI = 0x82F63B78
ALL_ONES = 0xFFFFFFFF
ROW_WORDS = 4096


def _times_x(a: int) -> int:
    return (a >> 1) ^ (CASTAGNOLI if a & 1 else 0)


def _times(a: int, b: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = _times_x(b)
    return product


@functools.lru_cache
def _x_to_the(bits: int) -> int:
    power, square = 1 << 31, 1 << 30
    while bits:
        if bits & 1:
            power = _times(power, square)
        square = _times(square, square)
        bits >>= 1
    return power


@functools.cache
def _append_tables(count: int) -> list[np.ndarray]:
    """What the low and the high 16 bits of a remainder become when `count` bytes follow: two tables (65536,)."""
    images = [_x_to_the(8 * count)]
    for _ in range(31):
        images.insert(0, _times_x(images[0]))
    tables = []
    for half in (images[:16], images[16:]):
        table = np.zeros(1, np.uint32)
        for image in half:
            table = np.concatenate([table, table ^ np.uint32(image)])
        tables.append(table)
    return tables


def _append(remainders: np.ndarray, count: int) -> np.ndarray:
    low, high = _append_tables(count)
    return low.take(remainders & 0xFFFF) ^ high.take(remainders >> 16)


def crc32c(data) -> int:
    """CRC-32C (Castagnoli, RFC 3720 appendix B.4) of a bytes-like object: about 1 GB/s on one core."""
    data = memoryview(data).cast("B")
    row_words = min(ROW_WORDS, 1 << (len(data) // 4).bit_length())  # a short message needs no long row
    row_bytes = 4 * row_words
    head = len(data) % row_bytes
    # Zeros in front do not change the remainder, so they fill the first row.
    remainders = np.frombuffer(bytes(row_bytes - head) + data[:head], "<u4")
    for row in np.frombuffer(data[head:], "<u4").reshape(-1, row_words):
        remainders = _append(remainders, row_bytes) ^ row
    while (half := len(remainders) // 2) > 0:
        remainders = _append(remainders[:half], 4 * half) ^ remainders[half:]
    start = _times(_x_to_the(8 * len(data)), ALL_ONES)
    return int(_append(remainders, 4)[0]) ^ start ^ ALL_ONES


def masked_crc32c(data) -> int:
    """The checksum as TensorFlow and LevelDB store it: rotated right by 15 bits, plus a constant, modulo 2^32."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & ALL_ONES


class _Cursor:
    """Reads from the front of `data`, never past its end."""

    def __init__(self, data: bytes):
        self.data = data
        self.at = 0

    def more(self) -> bool:
        return self.at < len(self.data)

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise _damaged("a record runs past its end")
        self.at += count
        return self.data[self.at - count : self.at]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise _damaged("a number is too long")


# Wire types of protocol buffers, and how to read one (https://protobuf.dev/programming-guides/encoding).
VARINT, BYTES, FIXED32 = 0, 2, 5
WIRE_TYPES = {
    VARINT: _Cursor.varint,
    1: lambda cursor: cursor.take(8),
    BYTES: lambda cursor: cursor.take(cursor.varint()),
    FIXED32: lambda cursor: int.from_bytes(cursor.take(4), "little"),
}


class _Message:
    """A protocol buffer: its fields by number and wire type. Fields we never ask for are skipped, as its rules want."""

    def __init__(self, data: bytes):
        self.fields = {}
        cursor = _Cursor(data)
        while cursor.more():
            tag = cursor.varint()
            if tag & 7 not in WIRE_TYPES:
                raise _damaged("a message has a field of no known kind")
            self.fields.setdefault((tag >> 3, tag & 7), []).append(WIRE_TYPES[tag & 7](cursor))

    def number(self, field: int, wire_type: int = VARINT) -> int:
        return self.fields.get((field, wire_type), [0])[-1]

    def messages(self, field: int) -> list["_Message"]:
        return [_Message(data) for data in self.fields.get((field, BYTES), [])]


@dataclass(frozen=True)
class Variable:
    """Where a variable is and how to read it (BundleEntryProto); `offset` and `size` in bytes."""

    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    masked_crc: int
    partitioned: bool

    @classmethod
    def parse(cls, data: bytes) -> "Variable":
        entry = _Message(data)
        shape = tuple(dim.number(1) for message in entry.messages(2) for dim in message.messages(2))
        if len(shape) > MAX_RANK:
            raise _damaged(f"a variable has {len(shape)} dimensions")
        return cls(
            dtype=DTYPES.get(entry.number(1), (f"number {entry.number(1)} of TensorFlow's types.proto",))[0],
            shape=shape,
            shard=entry.number(3),
            offset=entry.number(4),
            size=entry.number(5),
            masked_crc=entry.number(6, FIXED32),
            partitioned=bool(entry.messages(7)),
        )


def _block(table: bytes, offset: int, size: int) -> bytes:
    """The contents of a block, without its five bytes of trailer: compression type and checksum of all before it."""
    end = offset + size + 1
    if end + 4 > len(table) - FOOTER_SIZE:
        raise _damaged(f"the block at byte {offset} runs past the end")
    if masked_crc32c(table[offset:end]) != int.from_bytes(table[end : end + 4], "little"):
        raise _damaged(f"the checksum of the block at byte {offset} does not match")
    if table[end - 1] != 0:
        raise _Unreadable("is compressed, which this reader does not support: save it with TensorFlow's own Saver")
    return table[offset : end - 1]


def _pairs(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The (key, value) pairs of a block. A key is stored as how much it shares with the one before, and the rest."""
    restarts = int.from_bytes(block[-4:], "little")
    if len(block) < 4 * (restarts + 1):
        raise _damaged("a block is shorter than its list of restarts")
    cursor = _Cursor(block[: len(block) - 4 * (restarts + 1)])
    key = b""
    while cursor.more():
        shared, rest, size = cursor.varint(), cursor.varint(), cursor.varint()
        if shared > len(key) or shared + rest > MAX_KEY_BYTES:
            raise _damaged("a name in the table is too long")
        key = key[:shared] + cursor.take(rest)
        yield key, cursor.take(size)


def _table(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The (key, value) pairs of a table file, their keys strictly increasing."""
    footer = table[-FOOTER_SIZE:]
    if len(footer) < FOOTER_SIZE or int.from_bytes(footer[-8:], "little") != TABLE_MAGIC:
        raise _damaged("cut short or not the index of a TensorFlow V2 checkpoint")
    handles = _Cursor(footer[:-8])
    _block(table, handles.varint(), handles.varint())  # the metaindex: holds nothing for us, but verified like the rest
    last, block_end = None, 0
    for _, handle in _pairs(_block(table, handles.varint(), handles.varint())):
        cursor = _Cursor(handle)
        offset, size = cursor.varint(), cursor.varint()
        if offset < block_end:
            raise _damaged("its blocks overlap")
        block_end = offset + size
        for key, value in _pairs(_block(table, offset, size)):
            if last is not None and key <= last:
                raise _damaged("its names are out of order")
            last = key
            yield key, value


class TFCheckpoint:
    """The checkpoint `prefix`.index, `prefix`.data-*; reads the index at once and the values as they are asked for.

    `variables`: dict from name to `Variable`, sorted by name. Raises `InputError` if the index cannot be read, is
    damaged, or needs a newer or a big-endian reader.
    """

    def __init__(self, prefix: str | os.PathLike):
        self.prefix = Path(prefix)
        self.index_file = Path(f"{prefix}.index")
        self.variables: dict[str, Variable] = {}
        with _naming(self.index_file):
            if self.index_file.stat().st_size > MAX_INDEX_BYTES:
                raise _Unreadable(f"is over {MAX_INDEX_BYTES} bytes, too large for the index of a BERT checkpoint")
            pairs = _table(self.index_file.read_bytes())
            key, value = next(pairs, (None, b""))
            if key != b"":
                raise _damaged("it has no header")
            self._read_header(_Message(value))
            for key, value in pairs:
                # The parts of partitioned variables have keys that start with a zero byte, beside the variable's own.
                if not key.startswith(b"\0"):
                    self._add(key, Variable.parse(value))

    def _read_header(self, header: _Message):
        self.shards = header.number(1)
        if header.number(2) != 0:
            raise _Unreadable("is big-endian: save the checkpoint again on a little-endian machine")
        if any(version.number(2) > BUNDLE_VERSION for version in header.messages(3)):
            raise _Unreadable(f"needs a reader of a newer format than version {BUNDLE_VERSION}")

    def _add(self, key: bytes, variable: Variable):
        try:
            name = key.decode()
        except UnicodeDecodeError as error:
            raise _damaged(f"the name {key!r} is not UTF-8") from error
        if variable.shard >= self.shards:
            raise _damaged(f"variable {name!r} is in shard {variable.shard} of {self.shards}")
        self.variables[name] = variable

    def read(self, name: str) -> np.ndarray:
        """The variable's values, writable, in its shape and type; bfloat16 comes as float32, which holds it exactly.

        Raises `InputError` if there is no such variable, it has another type than those of `DTYPES`, is partitioned
        or empty, or its data file is missing, cut short or damaged.
        """
        if name not in self.variables:
            raise InputError(f"{self.index_file}: has no variable {name!r}")
        variable = self.variables[name]
        shard_file = Path(f"{self.prefix}.data-{variable.shard:05d}-of-{self.shards:05d}")
        with _naming(shard_file, f"variable {name!r}: "):
            stored_as, data = self._stored(variable, shard_file)
        values = np.frombuffer(data, stored_as).reshape(variable.shape)
        if variable.dtype == "bfloat16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(variable.dtype, copy=False)

    def _stored(self, variable: Variable, shard_file: Path) -> tuple[np.dtype, bytearray]:
        if variable.partitioned:
            raise _Unreadable("is partitioned, which this reader does not support: save it as one variable")
        if variable.dtype not in STORED_AS:
            raise _Unreadable(f"has the type {variable.dtype}; this reader knows {', '.join(STORED_AS)}")
        stored_as = np.dtype(STORED_AS[variable.dtype])
        if variable.size == 0:
            raise _Unreadable("is empty")
        if variable.size != math.prod(variable.shape) * stored_as.itemsize:
            raise _damaged(f"{variable.size} bytes do not fill its shape {variable.shape}")
        with open(shard_file, "rb") as file:
            if variable.offset + variable.size > os.fstat(file.fileno()).st_size:
                raise _damaged(f"the file ends before byte {variable.offset + variable.size}")
            data = bytearray(variable.size)
            file.seek(variable.offset)
            file.readinto(data)
        if masked_crc32c(data) != variable.masked_crc:
            raise _damaged("its checksum does not match")
        return stored_as, data
