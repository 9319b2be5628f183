"""Tracking: the JSON lines always, wandb where it works, and a run that continues where it does not."""

import doctest
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from mammostream.common.errors import BadInput
from mammostream.train.run import tracking
from mammostream.train.run.tracking import Tracker


def lines(tracker: Tracker) -> list[dict]:
    return [json.loads(line) for line in tracker.path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def no_wandb_settings(tmp_path_factory, monkeypatch):
    """No key and no settings of the user's, and no files outside the tests' directory."""
    home = tmp_path_factory.mktemp("home")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_every_line_is_on_the_disk_at_once_and_finite(tmp_path):
    with Tracker(tmp_path / "run", None, "disabled", {}) as tracker:
        tracker.log(1, {"loss": np.float32(0.5), "n": np.int64(3), "t": torch.tensor(2.0), "flag": True})
        assert lines(tracker) == [{"step": 1, "loss": 0.5, "n": 3, "t": 2.0, "flag": 1}]
        bad = {"nan": float("nan"), "inf": -np.inf, "none": None, "text": "1", "many": torch.zeros(2), "step": 9}
        tracker.log(np.int64(2), {"val": {"a": 1, **bad}, **bad})
        names = ("nan", "inf", "none", "text", "many")
        expected = {"step": 2, "val/a": 1, "val/step": 9} | {f"{p}{n}": None for p in ("", "val/") for n in names}
        assert lines(tracker)[1] == expected
    tracker.close()


def test_a_resumed_run_drops_the_steps_that_come_again(tmp_path):
    with Tracker(tmp_path, None, "disabled", {}) as tracker:
        for step in (0, 10, 20, 30):
            tracker.log(step, {"loss": step})
    with tracker.path.open("a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    with Tracker(tmp_path, None, "disabled", {}, resume_step=10) as tracker:
        assert [line["step"] for line in lines(tracker)] == [0, 10]
        tracker.log(20, {"loss": 21})
    assert [(line["step"], line["loss"]) for line in lines(tracker)] == [(0, 0), (10, 10), (20, 21)]


def test_a_run_that_is_not_resumed_starts_the_file_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5}\n')
    with Tracker(tmp_path, None, "disabled", {}) as tracker:
        tracker.log(7, {})
    assert lines(tracker) == [{"step": 7}]


def test_the_options_are_written_as_yaml(tmp_path):
    options = {"lr": 0.1, "class_names": ["a", "b"], "resume": None}
    with Tracker(tmp_path, None, "disabled", options):
        pass
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == options


def test_disabled_does_not_import_wandb(tmp_path):
    code = (
        "import sys; from mammostream.train.run.tracking import Tracker\n"
        f"with Tracker({str(tmp_path)!r}, 'p', 'disabled', {{}}) as t: t.log(1, {{'a': 1}})\n"
        "assert not {'wandb', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "metrics.jsonl"]


def test_auto_without_a_key_is_a_real_offline_run_inside_the_run_directory(tmp_path):
    run_dir = tmp_path / "run"
    with Tracker(run_dir, "my-project", "auto", {"lr": 0.1, "nested": {"a": [1]}}, "my-run") as tracker:
        run = tracker._run
        assert (run.settings.mode, run.project, run.name) == ("offline", "my-project", "my-run")
        assert run.config["lr"] == 0.1
        for step in range(3):
            tracker.log(step, {"loss": -step, "bad": float("nan"), "val": {"auc": 0.5}})
        assert dict(run.summary)["val/auc"] == 0.5
        assert "bad" not in dict(run.summary)
    folder = next((run_dir / "wandb").glob("offline-run-*"))
    (record,) = folder.glob("*.wandb")
    assert record.stat().st_size > 0
    assert (run_dir / "wandb_run_id.txt").read_text().strip() in record.name
    assert len(lines(tracker)) == 3

    with Tracker(run_dir, "my-project", "offline", {}, resume_step=1) as tracker:
        assert tracker._run.id == run.id
        assert tracker._run.name == "run"


def test_the_environments_mode_decides_auto(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with Tracker(tmp_path, None, "auto", {}) as tracker:
        assert tracker._run is None


def test_a_key_makes_auto_online_and_a_failure_offline(tmp_path, monkeypatch):
    import wandb

    attempts = []

    def init(**settings):
        attempts.append(settings["mode"])
        raise wandb.errors.CommError("no network\nmore")

    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(wandb, "login", lambda **kwargs: True)
    monkeypatch.setattr(wandb, "init", init)
    with pytest.warns(UserWarning, match=r"did not start (online|offline) \(no network\)") as caught:
        tracker = Tracker(tmp_path, None, "auto", {})
    assert attempts == ["online", "offline"]
    assert "going on offline" in str(caught[0].message)
    tracker.log(1, {"a": 1})
    tracker.close()
    assert lines(tracker) == [{"step": 1, "a": 1}]


def test_a_missing_wandb_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(UserWarning, match="wandb did not start"), Tracker(tmp_path, None, "offline", {}) as tracker:
        tracker.log(1, {"a": 1})
    assert lines(tracker) == [{"step": 1, "a": 1}]


class Dying:
    """A wandb run whose service has gone, and which notes how it was ended."""

    def __init__(self, dies: bool) -> None:
        self.dies = dies
        self.codes = []

    def log(self, metrics, step):
        if self.dies:
            raise BrokenPipeError("service gone")

    def finish(self, exit_code):
        self.codes.append(exit_code)


def test_wandb_dying_in_the_middle_is_a_warning(tmp_path):
    with Tracker(tmp_path, None, "disabled", {}) as tracker:
        tracker._run = Dying(dies=True)
        with pytest.warns(UserWarning, match=r"wandb stopped \(service gone\)"):
            tracker.log(1, {"a": 1})
        tracker.log(2, {"a": 2})
    assert len(lines(tracker)) == 2


def test_an_error_in_the_run_marks_it_failed(tmp_path):
    run = Dying(dies=False)

    def fail():
        with Tracker(tmp_path, None, "disabled", {}) as tracker:
            tracker._run = run
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert run.codes == [1]


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(BadInput, match="unknown wandb mode 'of'"):
        Tracker(tmp_path, None, "of", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="choose another output directory"):
        Tracker(tmp_path / "file", None, "disabled", {})


def test_the_example_runs():
    assert doctest.testmod(tracking).failed == 0
