"""Pseudonyms in place of patient, study and image ids: keyed hashes, and the map from the ids to them, kept apart.

A hash without a key hides nothing: ids are few enough to try them all. With a secret key (HMAC, RFC 2104) that takes the key.
So the key and the map stay with whoever may know the patients.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from mammostream.common.errors import BadInput
from mammostream.common.files import whole_file, writing

KEY_BYTES = 32
_LEAST_KEY_BYTES = 16
_DIGITS = 16  # 64 bits: among a million ids, two are alike with a chance of 1 to 37 million
_LEAST_LETTERS = 3  # of an id that is looked for within others


def read_key(path: Path) -> tuple[bytes, bool]:
    """Return the key in a file, and whether it was made: a missing file gets random bytes that only its owner may read.

    Raises
    ------
    BadInput
        The file cannot be read or written, or holds too short a key.
    """
    made = not path.exists()
    if made:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_secret(path, secrets.token_bytes(KEY_BYTES))
    try:
        key = path.read_bytes()
    except OSError as error:
        raise BadInput(f"--pseudonymise {path} cannot be read: {error.strerror}; name a file") from error
    if len(key) < _LEAST_KEY_BYTES:
        raise BadInput(
            f"--pseudonymise {path} holds {len(key)} bytes, too few for a key; give a file of {_LEAST_KEY_BYTES} random "
            "bytes or more, or name a new file, which is then made"
        )
    return key, made


def pseudonym(key: bytes, kind: str, name: str) -> str:
    """Return the pseudonym of an id of a kind (``patient``, ``study``, ``image``), such as ``P3f0a...``."""
    return kind[0].upper() + hmac.digest(key, f"{kind}\0{name}".encode(), "sha256").hex()[:_DIGITS]


def pseudonymised(
    films: pd.DataFrame, findings: pd.DataFrame | None, key: bytes, every_image: bool
) -> tuple[pd.DataFrame, pd.DataFrame | None, pd.DataFrame]:
    """Replace the ids of a manifest and its boxes.

    Parameters
    ----------
    films, findings
        The manifest and the boxes, or None.
    key
        See :func:`read_key`.
    every_image
        Replace all image ids: those of a plain folder are names of files, which may say anything. Otherwise those that hold the
        id of a patient or a study.

    Returns
    -------
    films, findings, map
        Copies with pseudonyms; and ``kind, id, pseudonym`` of each id that was replaced.
    """
    people = [*films["patient_id"], *films["study_id"]]
    replaced = {
        "patient": sorted(set(films["patient_id"]) - {""}),
        "study": sorted(set(films["study_id"]) - {""}),
        "image": sorted(films["image_id"] if every_image else _holding(films["image_id"], people)),
    }
    table = pd.DataFrame(
        [(kind, name, pseudonym(key, kind, name)) for kind, names in replaced.items() for name in names],
        columns=["kind", "id", "pseudonym"],
    )

    def renamed(frame: pd.DataFrame, kind: str) -> pd.Series:
        new = dict(table.loc[table["kind"] == kind, ["id", "pseudonym"]].to_numpy().tolist())
        return frame[f"{kind}_id"].map(lambda name: new.get(name, name))

    films = films.assign(**{f"{kind}_id": renamed(films, kind) for kind in replaced})
    return films, None if findings is None else findings.assign(image_id=renamed(findings, "image")), table


def write_map(path: Path, table: pd.DataFrame) -> None:
    """Write a map as CSV that only its owner may read; ids of an earlier map in that file stay.

    Raises
    ------
    BadInput
        The file cannot be written, or is there and holds no map.
    """
    if path.exists():
        try:
            table = pd.concat([pd.read_csv(path, dtype=str, keep_default_na=False)[list(table.columns)], table])
        except (OSError, ValueError, KeyError) as error:
            raise BadInput(f"{path} is there and holds no map of ids; move it away") from error
    with whole_file(path) as temporary:
        _write_secret(temporary, table.drop_duplicates().to_csv(index=False).encode())


def _holding(names: Iterable[str], ids: Iterable[str]) -> list[str]:
    """Return the names that hold one of the ids, whatever its case."""
    wanted = {one.lower() for one in ids if len(one) >= _LEAST_LETTERS}
    wanted_exactly = {one.lower() for one in ids}
    return [name for name in names if name.lower() in wanted_exactly or any(one in name.lower() for one in wanted)]


def _write_secret(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
