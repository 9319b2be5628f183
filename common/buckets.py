"""Objects in an S3 bucket that are read like files: the bucket's server and its keys come from the environment, as AWS's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

from common.errors import BadInput, first_line
from common.files import whole_file

SCHEME = "s3://"
_CACHE = "MAMMOSTREAM_CACHE"  # environment variable: where fetched tables and indexes are kept
_CONNECT_SECONDS, _ATTEMPTS = 10, 5


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
    def open(self, mode: str = "rb") -> Iterator[Any]:
        """Open the object to seek and read in; each read is a request of its own."""
        with talking_to(self.url), _file_system().open(self.url, mode, cache_type="none") as file:
            yield file

    def fetch(self, path: Path) -> bool:
        """Copy the object to a file, whole or not at all; return whether there is one."""
        if not self.is_file():
            return False
        with whole_file(path, sync=False) as temporary, talking_to(self.url):
            _file_system().get_file(self.url, str(temporary))
        return True

    def read_bytes(self) -> bytes:
        """Return the object's bytes; FileNotFoundError where there is none."""
        with talking_to(self.url):
            return _file_system().cat_file(self.url)


def cache_folder() -> Path:
    """Return where what was fetched is kept: $MAMMOSTREAM_CACHE, else mammostream in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(_CACHE) or Path(home) / "mammostream")


def lost_connection(url: str, reason: str) -> LostConnection:
    """Return the error of a server that does not answer."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
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
    from botocore.exceptions import ClientError, HTTPClientError, NoCredentialsError, ReadTimeoutError

    try:
        yield
    except FileNotFoundError:
        raise
    except (NoCredentialsError, PermissionError, ClientError) as error:
        raise BadInput(
            f"{url} may not be read ({first_line(error)}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        ) from error
    except (HTTPClientError, ReadTimeoutError, ConnectionError, TimeoutError, OSError) as error:
        raise lost_connection(url, first_line(error)) from error


def _size(url: str) -> int | None:
    with talking_to(url):
        try:
            info = _file_system().info(url, refresh=True)
        except FileNotFoundError:
            return None
    return info["size"] if info["type"] == "file" else None


@cache
def _file_system() -> Any:
    try:
        import s3fs
    except ImportError:
        raise BadInput("s3:// needs the package s3fs; install it with: pip install 'mammostream[s3]'") from None
    return s3fs.S3FileSystem(
        endpoint_url=os.environ.get("AWS_ENDPOINT_URL"),
        use_listings_cache=False,  # a bucket changes while we run
        config_kwargs={"retries": {"max_attempts": _ATTEMPTS, "mode": "standard"}, "connect_timeout": _CONNECT_SECONDS},
    )
