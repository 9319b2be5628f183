"""Objects in an S3 bucket, read like files; the server and its keys come from the environment, as AWS's own programs do it."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, TypeVar

from tqdm import tqdm

from mammostream.common.errors import BadInput, first_line
from mammostream.common.files import whole_file
from mammostream.common.temporaries import scratch_folder

SCHEME = "s3://"
_CACHE = "MAMMOSTREAM_CACHE"  # environment variable: where fetched tables and indexes are kept
ENDPOINT = "AWS_ENDPOINT_URL"
PATIENCE = "MAMMOSTREAM_BUCKET_PATIENCE"  # environment variable: seconds to wait for a server that went away
_PATIENCE_SECONDS = 180.0
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_CONNECT_SECONDS, _REQUEST_SECONDS, _ATTEMPTS = 5, 30, 3
_CHUNK = 2**24
_ADVICE = "; check the network, AWS_ENDPOINT_URL and the server, then run the same command again"
# What a refusal says, as against silence.
_REFUSALS = ("ACCESS_DENIED", "Access Denied", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "HTTP status 403")


Answer = TypeVar("Answer")


class LostConnection(BadInput):
    """A bucket's server cannot be reached, after several tries."""


class Patience:
    """Waits between the tries to reach a server, twice as long each time, up to $MAMMOSTREAM_BUCKET_PATIENCE seconds in all."""

    def __init__(self) -> None:
        self._pause, self._until = _FIRST_PAUSE, 0.0

    def wait(self, error: LostConnection) -> None:
        """Say what is waited for and wait; raise `error` where it has taken too long."""
        now = time.monotonic()
        self._until = self._until or now + _patience_seconds()
        left = self._until - now
        if left <= 0:
            raise error
        pause = min(self._pause, left)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        what = str(error).rpartition(_ADVICE)[0]
        tqdm.write(f"{what}; trying again in {pause:.0f} s, for {left:.0f} s more ({PATIENCE})", file=sys.stderr)
        time.sleep(pause)

    def restore(self) -> None:
        """The server answers again: the next outage gets the whole time."""
        self._pause, self._until = _FIRST_PAUSE, 0.0


def _patience_seconds() -> float:
    given = os.environ.get(PATIENCE) or str(_PATIENCE_SECONDS)
    try:
        return float(given)
    except ValueError:
        raise BadInput(f"{PATIENCE} {given!r} is no number of seconds; set it to one like 180") from None


def _patiently(ask: Callable[[], Answer]) -> Answer:
    patience = Patience()
    while True:
        try:
            return ask()
        except LostConnection as error:
            patience.wait(error)


def as_bucket(place: str | os.PathLike) -> BucketPath | None:
    """Return a bucket's place as such, and None for a place on a disk."""
    scheme, colon, rest = str(place).partition(":/")  # a Path has made one slash of two
    return BucketPath(SCHEME + rest.strip("/")) if colon and scheme == "s3" else None


@dataclass(frozen=True)
class BucketPath:
    """An object, or the prefix of several: of :class:`pathlib.Path` what reading takes.

    Attributes
    ----------
    url
        ``s3://bucket/prefix/name``.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> BucketPath:
        return BucketPath(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The part after the last slash."""
        return PurePosixPath(self.url).name

    @property
    def parent(self) -> BucketPath:
        """What lies before the last slash."""
        return BucketPath(self.url.rstrip("/").rpartition("/")[0])

    def reach(self) -> None:
        """Ask the server once, without waiting for it: one that never answered is more likely misnamed than away."""
        with talking_to(self.url):
            _file_system().get_file_info(_key(self.url))

    def is_file(self) -> bool:
        """Whether there is such an object; as every request but :meth:`reach`, it waits for a server that went away."""
        return _info(self.url) is not None

    def stat(self) -> Any:
        """Return an object with ``st_size``, the object's bytes, and ``st_mtime_ns``, when it was written.

        Raises
        ------
        FileNotFoundError
            There is no such object.
        LostConnection, BadInput
            The server does not answer, or refuses.
        """
        info = _info(self.url)
        if info is None:
            raise FileNotFoundError(self.url)
        return SimpleNamespace(st_size=info.size, st_mtime_ns=info.mtime_ns)

    @contextmanager
    def open(self, mode: str) -> Iterator[Any]:
        """Open the object to seek and read in, `mode` being ``rb``; each read is its own request."""
        yield _Object(self.url, self.stat().st_size)

    def fetch(self, path: Path) -> bool:
        """Copy the object to a file, whole or not at all; return whether there is one."""
        if not self.is_file():
            return False
        with whole_file(path, sync=False) as temporary, self.open("rb") as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target, _CHUNK)
        return True

    @contextmanager
    def at_hand(self, folder: Path) -> Iterator[Path]:
        """Yield a copy of the object on a disk, in a folder of its own below `folder`, and remove it afterwards."""
        folder.mkdir(parents=True, exist_ok=True)
        with scratch_folder(folder) as scratch:
            self.fetch(Path(scratch) / self.name)
            yield Path(scratch) / self.name

    def read_bytes(self) -> bytes:
        """Return the object's bytes; FileNotFoundError where there is none."""
        with self.open("rb") as file:
            return file.read()


class _Object:
    """An object that is being read; a lost connection is waited for."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size, self._place = url, size, 0
        self._file: Any = None

    def seek(self, place: int) -> None:
        self._place = place

    def read(self, count: int | None = None) -> bytes:
        left = max(0, self._size - self._place)
        data = _patiently(lambda: self._request(left if count is None else min(count, left)))
        self._place += len(data)
        return data

    def _request(self, count: int) -> bytes:
        with talking_to(self._url):
            self._file = self._file or _file_system().open_input_file(_key(self._url))
            return self._file.read_at(count, self._place)


def cache_folder() -> Path:
    """Return where what was fetched is kept: $MAMMOSTREAM_CACHE, else mammostream in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(_CACHE) or Path(home) / "mammostream")


def lost_connection(url: str, reason: str) -> LostConnection:
    """Return the error of a server that does not answer."""
    endpoint = os.environ.get(ENDPOINT)
    where = f"AWS_ENDPOINT_URL {endpoint}" if endpoint else "AWS (AWS_ENDPOINT_URL is not set)"
    return LostConnection(f"bucket {url.removeprefix(SCHEME).partition('/')[0]}: {where} does not answer ({reason}){_ADVICE}")


@contextmanager
def talking_to(url: str) -> Iterator[None]:
    """Turn the errors of a bucket's server into one line; what is not there stays FileNotFoundError.

    Raises
    ------
    LostConnection
        It does not answer.
    BadInput
        It refuses, or no keys are set.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = first_line(error)
        if any(word in reason for word in _REFUSALS):
            raise BadInput(
                f"{url} may not be read ({reason}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            ) from error
        raise lost_connection(url, reason) from error


@contextmanager
def naming(folder: Path, place: Path | BucketPath) -> Iterator[None]:
    """Let an error name the place that a folder's files were fetched from."""
    try:
        yield
    except BadInput as error:
        if str(folder) == str(place) or isinstance(error, LostConnection):
            raise
        raise BadInput(str(error).replace(str(folder), str(place))) from error


def refuse_bucket(place: str | os.PathLike, flag: str) -> None:
    """Refuse a place in a bucket where only one on a disk will do."""
    if bucket := as_bucket(place):
        raise BadInput(
            f"{flag} {bucket} lies in a bucket, of which only finished shards are read; copy it to a disk, or give a "
            "place on a disk and upload what is written there"
        )


def _info(url: str) -> Any:
    """Return what the server says of an object; None where there is none."""

    def ask() -> Any:
        with talking_to(url):
            return _file_system().get_file_info(_key(url))

    info = _patiently(ask)
    return info if info.is_file else None


def _key(url: str) -> str:
    return url.removeprefix(SCHEME)


@cache
def _file_system() -> Any:
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    # Keys and region are found as AWS's own programs find them.
    return S3FileSystem(
        endpoint_override=os.environ.get(ENDPOINT),
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_REQUEST_SECONDS,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
    )
