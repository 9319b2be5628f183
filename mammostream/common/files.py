"""Files that are whole or absent: written under a temporary name, synced, then renamed; tables with checked columns."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mammostream.common.errors import BadInput, first_line, nearest
from mammostream.common.temporaries import remove_leftovers, temporary_name

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


FACTS_KEY = b"mammostream"
"""Where the metadata of a Parquet file has what it records next to its rows, as JSON."""
# How a disk says that it cannot take a file: the place is wrong or forbidden, or the room is used up.
_WRONG_PLACE = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EROFS}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the errors of a disk that cannot be written to into one clear line.

    Raises
    ------
    BadInput
        The disk is full or read-only, or `path` may not be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _WRONG_PLACE | _NO_ROOM:
            raise
        mend = (
            "free some space and run the same command again" if error.errno in _NO_ROOM else "choose another output directory"
        )
        raise BadInput(f"cannot write {path}: {os.strerror(error.errno)}; {mend}") from error


@contextmanager
def whole_file(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `path`; on success sync it and rename it to `path`, on failure remove it.

    The folder is synced too, so that files renamed one after the other survive a power cut in that order; many small files
    that are easily made again can do without (`sync`). Process and machine in the name keep two writers apart. A temporary file
    left by a killed process is never mistaken for a finished one, since nothing reads ``*.tmp``; it goes when the next command
    writes into the folder (:func:`mammostream.common.temporaries.remove_leftovers`).

    Raises
    ------
    BadInput
        See :func:`writing`.
    """
    temporary = path.with_name(temporary_name(path.name))
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            yield temporary
            if sync:
                _sync(temporary)
            temporary.replace(path)
            if sync:
                _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True) if temporary.parent.is_dir() else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def second_name(source: Path, path: Path) -> None:
    """Give a file another name, whole or not at all: a hard link, or a copy on file systems without them.

    For files that are replaced, never changed: each name then keeps what it named.
    """
    with whole_file(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def make_folder(path: Path) -> None:
    """Make a folder and its parents where they are not there yet.

    Raises
    ------
    BadInput
        It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the folder {path}: {error.strerror}; choose another output directory") from error


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_yaml(path: Path, value: dict[str, Any]) -> None:
    """Write a mapping as YAML in its own order, whole or not at all."""
    import yaml

    write_text(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def write_parquet(path: Path, table: pa.Table, facts: Mapping[str, Any] | None = None) -> None:
    """Write an Arrow table as Parquet, whole or not at all; the same table gives the same bytes.

    With `facts`, which are plain types, they are the file's metadata instead of the table's: see :func:`parquet_facts`.
    """
    import pyarrow.parquet as pq

    if facts is not None:
        table = table.replace_schema_metadata({FACTS_KEY: json.dumps(facts, sort_keys=True).encode()})
    with whole_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def parquet_facts(path: Path) -> Any:
    """Return the facts that :func:`write_parquet` wrote with a table; an empty dict where there are none.

    Raises
    ------
    OSError, ValueError
        The file is missing or damaged.
    """
    import pyarrow.parquet as pq

    return json.loads((pq.read_schema(path).metadata or {}).get(FACTS_KEY, b"{}"))


def read_parquet(path: Path, what: str, mend: str, columns: Iterable[str] = (), nested: Iterable[str] = ()) -> pd.DataFrame:
    """Read a Parquet table and check that it has `columns`.

    Parameters
    ----------
    path
        The file.
    what
        What the file is, for the error ("manifest").
    mend
        What to do where it is missing ("make one with ...").
    columns
        Columns that must be there.
    nested
        The only columns that may hold lists.

    Raises
    ------
    BadInput
        The file is missing, not Parquet, or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise BadInput(f"{what} {path} does not exist; {mend}")
    try:
        table = pq.read_table(path)
        table.validate(full=True)  # text may be no UTF-8
        frame = table.to_pandas()
    except (OSError, ValueError, NotImplementedError) as error:
        raise BadInput(f"{what} {path} is not a Parquet file: {first_line(error)}; {mend}") from error
    for field in table.schema:
        if pa.types.is_nested(field.type) and field.name not in nested:
            raise BadInput(f"{what} {path}: column '{field.name}' holds lists or records; give one value per row")
    require_columns(frame, columns, f"{what} {path}")
    return frame


def read_csv(path: Path, what: str, columns: Iterable[str] = ()) -> pd.DataFrame:
    """Read a CSV (a UTF-8 byte-order mark and Windows line ends are fine) and check that it has `columns`.

    Raises
    ------
    BadInput
        The file is missing, not a CSV, has no rows, or lacks a column.
    """
    import pandas as pd

    if not path.is_file():
        raise BadInput(f"{what} {path} does not exist; check the path")
    try:
        text = dict.fromkeys(("patient_id", "study_id", "image_id", "tile_path", "key"), str)
        # Without index_col=False a comma too many at the end of a line would move every column by one.
        frame = pd.read_csv(path, encoding="utf-8-sig", dtype=text, index_col=False)
    except (ValueError, OSError) as error:
        raise BadInput(f"{what} {path} cannot be read as CSV: {first_line(error)}; save it as comma-separated UTF-8") from error
    if frame.empty:
        raise BadInput(f"{what} {path} has no rows; give a CSV with a header and at least one row")
    require_columns(frame, columns, f"{what} {path}")
    return frame


def require_columns(frame: pd.DataFrame, columns: Iterable[str], what: str) -> None:
    """Raise BadInput naming the first of `columns` that `frame` lacks, and the nearest it has."""
    for column in columns:
        if column not in frame.columns:
            have = ", ".join(map(str, frame.columns))
            raise BadInput(f"{what} has no column '{column}'{nearest(column, frame.columns)}; its columns are: {have}")


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of a JSON-able value in canonical form (sorted keys, no spaces) as hex."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
