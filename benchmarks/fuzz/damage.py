"""Seeded damage to bytes and to the values of JSON, YAML, CSV and Parquet; functions return the content and a note."""

from __future__ import annotations

import csv
import io
import json
import struct
from random import Random
from typing import Any

JUNK: tuple[Any, ...] = (
    None,
    "",
    "x",
    "nan",
    "../../etc",
    "ä\u2028\0\n",
    True,
    -1,
    0,
    1,
    3.5,
    2**31 - 1,
    -(2**31),
    2**63,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    [],
    {},
    [[]],
    {"a": {"b": [1, None]}},
    "9" * 5000,
)


def _place(data: bytes, rng: Random) -> int:
    """A position: half of all in the first or last 2 KB, where headers and directories are."""
    where = rng.random()
    if where < 0.35:
        return rng.randrange(min(len(data), 2048))
    if where < 0.5:
        return max(0, len(data) - 1 - rng.randrange(min(len(data), 2048)))
    return rng.randrange(len(data))


def flip(data: bytes, rng: Random) -> bytes:
    """1 to 8 bits flipped."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(out)


def overwrite(data: bytes, rng: Random) -> bytes:
    """A run of bytes overwritten."""
    at, length = _place(data, rng), rng.choice((4, 16, 64, 512, 4096))
    run = rng.choice((b"\0" * length, b"\xff" * length, rng.randbytes(length)))
    return data[:at] + run[: len(data) - at] + data[at + length :]


def truncate(data: bytes, rng: Random) -> bytes:
    """The end missing, from anywhere."""
    return data[: rng.choice((0, _place(data, rng), rng.randrange(len(data)), len(data) - rng.randrange(1, 16)))]


def insert(data: bytes, rng: Random) -> bytes:
    """Bytes inserted."""
    at = _place(data, rng)
    return data[:at] + rng.randbytes(rng.choice((1, 2, 16, 1000))) + data[at:]


def repeat(data: bytes, rng: Random) -> bytes:
    """A chunk twice."""
    at, length = _place(data, rng), rng.choice((1, 16, 512, 4096))
    return data[: at + length] + data[at:]


def leave_out(data: bytes, rng: Random) -> bytes:
    """A chunk missing."""
    at = _place(data, rng)
    return data[:at] + data[at + rng.choice((1, 2, 16, 512)) :]


def extreme(data: bytes, rng: Random) -> bytes:
    """A field of 2, 4 or 8 bytes set to 0, -1, the largest or the smallest number."""
    size = rng.choice((2, 4, 8))
    at = min(_place(data, rng), max(0, len(data) - size)) & ~1
    value = rng.choice(
        (bytes(size), b"\xff" * size, b"\x7f" + b"\xff" * (size - 1), b"\xff" * (size - 1) + b"\x7f", b"\x80" + bytes(size - 1))
    )
    return data[:at] + value + data[at + size :]


def swap(data: bytes, rng: Random) -> bytes:
    """Two fields exchanged."""
    size = rng.choice((2, 4, 8, 16))
    a, b = sorted((_place(data, rng), _place(data, rng)))
    b = max(b, a + size)
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


BYTES = (flip, overwrite, truncate, insert, repeat, leave_out, extreme, swap)


def bytes_damage(data: bytes, rng: Random) -> tuple[bytes, str]:
    """One of :data:`BYTES`."""
    how = rng.choice(BYTES)
    return how(data, rng) if data else b"x", how.__name__


def tree_damage(value: Any, rng: Random) -> str:
    """Remove or replace one value of nested dicts and lists, in place; return what was done."""
    places = []

    def walk(node: Any, way: str) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key, f"{way}.{key}"))
            if isinstance(node[key], (dict, list)):
                walk(node[key], f"{way}.{key}")

    walk(value, "")
    node, key, way = rng.choice(places)
    done = rng.choice(("remove", "replace", "replace", "rename"))
    if done == "replace":
        node[key] = rng.choice(JUNK)
        return f"{way} = {node[key]!r:.40}"
    gone = node.pop(key)
    if done == "rename" and isinstance(node, dict):
        node[f"{key} "] = gone
    return f"{way} {done}d"


def json_damage(data: bytes, rng: Random) -> tuple[bytes, str]:
    """One value of a JSON document."""
    value = json.loads(data)
    note = tree_damage(value, rng)
    return json.dumps(value).encode(), note


def yaml_damage(data: bytes, rng: Random) -> tuple[bytes, str]:
    """One value of a YAML document, or its text."""
    import yaml

    if rng.random() < 0.25:
        text = rng.choice(
            (
                b"a: &a [*a]",
                b"- x\n- y",
                b"!!python/object/apply:os.system ['touch executed']",
                b"\t: x",
                b"{" * 2000,
                b"a: b: c",
                data.decode().encode("utf-16"),
                data + b"\0",
                b"batch_size: 12:30:00\n",
                b"? [a]\n: 1\n",
                b"2020-01-01: 1\n",
                b"\xff\xfe\xfd",
            )
        )
        return text, f"{text[:30]!r}"
    value = yaml.safe_load(data)
    note = tree_damage(value, rng)
    return yaml.safe_dump(value).encode(), note


def csv_damage(data: bytes, rng: Random) -> tuple[bytes, str]:
    """Cells, rows, header, separator or encoding of a CSV."""
    rows = list(csv.reader(io.StringIO(data.decode())))
    row = rng.randrange(1, len(rows))
    column = rng.randrange(len(rows[0]))
    how = rng.choice(
        (
            "cell",
            "cell",
            "extra cell",
            "missing cell",
            "no header",
            "header twice",
            "drop column",
            "double column",
            "double row",
            "nul",
            "utf-16",
            "latin",
            "quote",
            "separator",
            "empty line",
            "huge cell",
            "no rows",
            "header only junk",
        )
    )
    if how == "cell":
        rows[row][column] = str(rng.choice(JUNK))[:100]
        how = f"cell {column} = {rows[row][column]!r:.30}"
    elif how == "extra cell":
        rows[row] = [*rows[row], "1"]
    elif how == "missing cell":
        rows[row] = rows[row][:-1]
    elif how == "no header":
        rows = rows[1:]
    elif how == "header twice":
        rows.insert(row, rows[0])
    elif how == "drop column":
        rows = [r[:column] + r[column + 1 :] for r in rows]
    elif how == "double column":
        rows = [[*r, r[column]] for r in rows]
    elif how == "double row":
        rows.insert(row, rows[row])
    elif how == "huge cell":
        rows[row][column] = "7" * 200_000
    elif how == "no rows":
        rows = rows[:1]
    elif how == "header only junk":
        rows[0] = [rng.choice(("", "a", "tile_path", "\x01")) for _ in rows[0]]
    text = io.StringIO()
    csv.writer(text, delimiter="|" if how == "separator" else ",", lineterminator="\n").writerows(rows)
    out = text.getvalue().encode()
    at = rng.randrange(len(out)) if out else 0
    if how == "nul":
        out = out[:at] + b"\0" + out[at:]
    elif how == "utf-16":
        out = out.decode().encode("utf-16")
    elif how == "latin":
        out = out[:at] + b"\xe4\xff" + out[at:]
    elif how == "quote":
        out = out[:at] + b'"' + out[at:]
    elif how == "empty line":
        out = out.replace(b"\n", b"\n\n,\n", 2)
    return out, how


def table_damage(data: bytes, rng: Random) -> tuple[bytes, str]:
    """Columns and rows of a Parquet table."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    original = pq.read_table(io.BytesIO(data))
    frame = original.to_pandas()
    column = rng.choice(list(frame.columns))
    row = rng.randrange(len(frame))
    values: list[Any] = frame[column].tolist()
    how = rng.choice(
        (
            "drop",
            "rename",
            "text",
            "float",
            "int",
            "bool",
            "bytes",
            "list",
            "null",
            "all null",
            "nan",
            "inf",
            "huge",
            "negative",
            "double row",
            "no rows",
            "junk text",
            "double column",
            "reverse",
            "index",
        )
    )
    whole = {"float": 1.5, "int": 7, "bool": True, "bytes": b"\xff", "list": [1], "all null": None}
    single = {"null": None, "nan": float("nan"), "inf": float("inf"), "huge": 1e300, "negative": -5.0}
    if how in whole:
        values = [whole[how]] * len(values)
    elif how == "text":
        values = [str(v) for v in values]
    elif how in single:
        number = pd.api.types.is_numeric_dtype(frame[column])
        values[row] = single[how] if number or how == "null" else str(single[how])
    elif how == "junk text":
        values = [str(v) for v in values]
        values[row] = rng.choice(("a\0b", "x\ny", "../../x", "ä\u202e", "z" * 5000, " ", "=1+1", "s3://x/y"))
    arrays = {name: original.column(name) for name in original.column_names}
    if how in whole or how in single or "text" in how:
        try:
            arrays[column] = pa.array(values, from_pandas=False)
        except (pa.ArrowInvalid, pa.ArrowTypeError):  # of two types: one column of a file has one
            arrays[column], how = pa.array(["" if v is None else str(v) for v in values]), f"{how} as text"
    table = pa.table(arrays).replace_schema_metadata(original.schema.metadata)
    if how == "drop":
        table = table.drop_columns([column])
    elif how == "rename":
        table = table.rename_columns([f"{c}2" if c == column else c for c in table.column_names])
    elif how == "double row":
        table = pa.concat_tables([table, table.slice(row, 1)])
    elif how == "no rows":
        table = table.slice(0, 0)
    elif how == "double column":
        table = table.append_column(column, table.column(column))
    elif how == "reverse":
        table = table.take(list(range(len(table)))[::-1])
    elif how == "index":
        table = pa.Table.from_pandas(frame.set_index(column))
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue(), f"{how} {column}"


def ascii_number_damage(data: bytes, rng: Random) -> tuple[bytes, str]:
    """A number of a text (an index, a PGM's header) set to another."""
    import re

    found = list(re.finditer(rb"\d+", data[:4096]))
    match = rng.choice(found)
    new = rng.choice((b"0", b"-1", b"1", b"99999999", b"9" * 30, b"x", b"", b"4294967296", b"1e9"))
    return data[: match.start()] + new + data[match.end() :], f"{match.group()!r} -> {new!r}"


def pack(fmt: str, value: int) -> bytes:
    """`value`, cut to the field's size."""
    size = struct.calcsize(fmt)
    return (value & (256**size - 1)).to_bytes(size, "big" if fmt[0] == ">" else "little")
