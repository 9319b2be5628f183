"""The run sheet for a GPU: a part that fails or hangs is a row, and what is printed last fits into what comes back."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

PYTHON = sys.executable


@pytest.fixture(scope="module")
def sheet() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks/gpu/check.py"
    spec = importlib.util.spec_from_file_location("gpu_check", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def result(output: str, failure: str = "", name: str = "step") -> dict:
    return {"name": name, "what": name, "command": "c", "seconds": 1.0, "output": output, "failure": failure} | {
        "gpu_utilisation_percent": []
    }


def test_commands_run_in_order_until_one_fails(sheet):
    commands = (
        f"{PYTHON} -c 'print(1)'",
        f"{PYTHON} -c 'import sys; print(2); sys.exit(3)'",
        f"{PYTHON} -c 'print(4)'",
    )
    done = sheet.run(sheet.Part("p", "a part", commands, 60), 60)
    assert (done["output"], done["failure"]) == ("1\n2\n", "exit code 3")
    assert "**exit code 3**" in sheet.section(done)
    assert "1\n2\n" in sheet.section(done)


def test_a_part_without_time_is_not_started(sheet, tmp_path):
    done = sheet.run(sheet.Part("p", "a part", (f"touch {tmp_path}/started",), 60), 3)
    assert done["failure"] == "no time was left"
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("ends", [True, False])
def test_what_takes_too_long_may_save_and_is_ended_with_all_its_children(sheet, tmp_path, monkeypatch, ends):
    """What a child holds open does not keep the run sheet waiting."""
    monkeypatch.setattr(sheet, "SAVING_S", 1)
    script = tmp_path / "slow.py"
    script.write_text(
        "import signal, subprocess, sys, time, pathlib\n"
        "subprocess.Popen(['sleep', '60'])\n"
        "def stop(*_):\n"
        f"    pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n"
        f"    {'sys.exit(75)' if ends else 'pass'}\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "print('started', flush=True)\n"
        "time.sleep(60)\n"
    )
    started = time.monotonic()
    output, failure = sheet.run_command(f"{PYTHON} {script}", 3)
    assert time.monotonic() - started < 30
    assert (output, failure) == ("started\n", "took longer than 3 s")
    assert (tmp_path / "saved").exists()


def test_the_ending_fits_and_ends_with_the_outcomes(sheet):
    tables = result("| a | b |\n" * 5000)
    tests = result("FAILED tests/x.py::y - AssertionError\n" * 2000 + "2 failed, 3 passed in 1.0s\n", "exit code 1", "tests")
    for results in ([tests, tables], [tables], [tests]):
        said = sheet.ending(results)
        assert len(said) <= 12_000
        for one in results:
            assert f"| {one['what']} | 1 | {one['failure'] or 'done'} |" in said
    assert "2 failed, 3 passed" in sheet.ending([tests])
    assert sheet.ending([tables]).count("| a | b |") > 500


def test_progress_bars_are_left_out(sheet):
    code = r'print("\rbuilding: 10%|# | 1/9\rbuilding: 90%|## | 9/9\n\nspeed 3")'
    assert sheet.run_command(f"{PYTHON} -c '{code}'", 60) == ("speed 3\n", "")


def test_both_calls_have_each_part_once(sheet, tmp_path):
    """No part is listed twice; the second call trains on the films only where they are given."""
    for mias in (None, tmp_path):
        made = sheet.Sheet("cuda", False, tmp_path, tmp_path, mias)
        for call in sheet.BUDGETS:
            names = [part.name for part in made.call(call)]
            assert len(names) == len(set(names))
            assert ("resnet18-guide" in names) == (call == "second" and mias is not None)
