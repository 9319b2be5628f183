"""Checkpoints are large, so they are deleted after the test that made them."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_checkpoints_left(request: pytest.FixtureRequest) -> Iterator[None]:
    # Requested before the test: after it the folder's fixture may be gone.
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    for path in folder.rglob("*.pth") if folder else ():
        path.unlink()
