"""Writes TensorFlow V2 checkpoints, whole or wrong on purpose, for the tests of their reader.

It shares no code with the reader; `test_the_writer_writes_what_tensorflow_wrote` compares it with TensorFlow itself.
"""

import struct
from pathlib import Path

import numpy as np

TABLE_MAGIC = 0xDB4775248B80FB57
DTYPE_NUMBERS = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "bool": 10, "float16": 19}


def _byte_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


BYTE_TABLE = _byte_table()


def naive_crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ BYTE_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer. Zero is not written, as proto3 has it."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value) if value else b""


def entry(dtype: int, shape: tuple[int, ...], shard: int, offset: int, data: bytes) -> bytes:
    """A BundleEntryProto."""
    dims = b"".join(field(2, field(1, size)) for size in shape)
    place = field(3, shard) + field(4, offset) + field(5, len(data))
    return field(1, dtype) + field(2, dims) + place + b"\x35" + struct.pack("<I", masked(naive_crc32c(data)))


def block(pairs: list[tuple[bytes, bytes]], restart_interval: int = 16) -> bytes:
    out, restarts, last = b"", [], b""
    for number, (key, value) in enumerate(pairs):
        shared = 0
        if number % restart_interval == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(last), len(key)) and last[shared] == key[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    return out + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def table(blocks: list[bytes], compression: int = 0) -> bytes:
    """A table file of these blocks, with right checksums whatever they hold."""
    out = b""

    def add(contents: bytes) -> bytes:
        nonlocal out
        handle = varint(len(out)) + varint(len(contents))
        contents += bytes([compression])
        out += contents + struct.pack("<I", masked(naive_crc32c(contents)))
        return handle

    # LevelDB shortens the key after the last block to its first byte plus one; any key in between would do.
    handles = [(b"d" if number == len(blocks) - 1 else b"", add(data)) for number, data in enumerate(blocks)]
    footer = add(block([])) + add(block(handles))
    return out + footer.ljust(40, b"\0") + struct.pack("<Q", TABLE_MAGIC)


def write_checkpoint(
    prefix: Path,
    variables: dict[str, np.ndarray],
    shards: int = 1,
    pairs_per_block: int = 10**9,
    append: dict[str, bytes] | None = None,
    compression: int = 0,
) -> Path:
    """Write the variables round robin into the shards.

    `append` adds raw fields to a variable's entry ("" is the header); in a protocol buffer the last value counts, so
    they override it.
    """
    append = append or {}
    data = [b""] * shards
    pairs = [(b"", field(1, shards) + field(3, field(1, 1)) + append.get("", b""))]
    for number, name in enumerate(sorted(variables)):
        values, shard = variables[name], number % shards
        stored = values.tobytes()
        dtype = DTYPE_NUMBERS.get(values.dtype.name, 0)
        made = entry(dtype, values.shape, shard, len(data[shard]), stored)
        pairs.append((name.encode(), made + append.get(name, b"")))
        data[shard] += stored
    blocks = [block(pairs[start : start + pairs_per_block]) for start in range(0, len(pairs), pairs_per_block)]
    Path(f"{prefix}.index").write_bytes(table(blocks, compression))
    for shard, contents in enumerate(data):
        Path(f"{prefix}.data-{shard:05d}-of-{shards:05d}").write_bytes(contents)
    return prefix
