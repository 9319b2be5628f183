"""Objects in an S3 bucket, read like files; the server and its keys come from the environment, as AWS's own programs do it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

from mammostream.common.errors import BadInput, first_line
from mammostream.common.files import whole_file

SCHEME = "s3://"
_CACHE = "MAMMOSTREAM_CACHE"  # environment variable: where fetched tables and indexes are kept
ENDPOINT = "AWS_ENDPOINT_URL"
_CONNECT_SECONDS, _REQUEST_SECONDS, _ATTEMPTS = 5, 30, 5
# What a refusal says, as against silence.
_REFUSALS = ("ACCESS_DENIED", "Access Denied", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "HTTP status 403")


class LostConnection(BadInput):
    """A bucket's server cannot be reached, after several tries."""


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

    def is_file(self) -> bool:
        """Whether there is such an object."""
        return _size(self.url) is not None

    def stat(self) -> Any:
        """Return an object with ``st_size``, the object's bytes.

        Raises
        ------
        FileNotFoundError
            There is no such object.
        LostConnection, BadInput
            The server does not answer, or refuses.
        """
        size = _size(self.url)
        if size is None:
            raise FileNotFoundError(self.url)
        return SimpleNamespace(st_size=size)

    @contextmanager
    def open(self, mode: str) -> Iterator[Any]:
        """Open the object to seek and read in, `mode` being ``rb``; each read is its own request."""
        with talking_to(self.url), _file_system().open_input_file(_key(self.url)) as file:
            yield file

    def fetch(self, path: Path) -> bool:
        """Copy the object to a file, whole or not at all; return whether there is one."""
        if not self.is_file():
            return False
        with whole_file(path, sync=False) as temporary:
            temporary.write_bytes(self.read_bytes())
        return True

    def read_bytes(self) -> bytes:
        """Return the object's bytes; FileNotFoundError where there is none."""
        with self.open("rb") as file:
            return file.read()


def cache_folder() -> Path:
    """Return where what was fetched is kept: $MAMMOSTREAM_CACHE, else mammostream in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(_CACHE) or Path(home) / "mammostream")


def lost_connection(url: str, reason: str) -> LostConnection:
    """Return the error of a server that does not answer."""
    endpoint = os.environ.get(ENDPOINT)
    where = f"AWS_ENDPOINT_URL {endpoint}" if endpoint else "AWS (AWS_ENDPOINT_URL is not set)"
    return LostConnection(
        f"bucket {url.removeprefix(SCHEME).partition('/')[0]}: {where} does not answer ({reason}); check the network, "
        "AWS_ENDPOINT_URL and the server, then run the same command again"
    )


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


def _size(url: str) -> int | None:
    with talking_to(url):
        info = _file_system().get_file_info(_key(url))
    return info.size if info.is_file else None


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
