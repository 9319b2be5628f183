"""Run damaged inputs through the commands that read them: ``python -m benchmarks.fuzz --output-dir runs/fuzz``.

Each case is a child of a fork server with limits of time and memory. Verdicts: signal, traceback, hang, memory, executed (a
pickle's code), untidy (an error that is not one line), silent (exit code 0 and another result than the clean input's, without
a word, although the damage shows in the input itself), harness (a fault of this program), ok. A word is a flag or reason of a
film or tile, a row of problems.csv, or a line that is not in the clean input's output and says warning, error, damaged,
left out, bad or the like. The same seed makes the same cases; a case's folder stays where its verdict is not ok.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import click

from benchmarks.fuzz.base import complete, make_run
from benchmarks.fuzz.checkpoint_damage import MARK
from benchmarks.fuzz.server import Ended, run_all, warm_up
from benchmarks.fuzz.staging import Target, command_line, stage
from benchmarks.fuzz.targets import environment, targets

VERDICTS = ("signal", "traceback", "hang", "memory", "executed", "untidy", "silent", "harness", "ok")
_WORD = re.compile(
    r"warn|error|damag|left out|bad|cannot|could not|flag|not |without|no |skipp|missing|only|seems|instead", re.I
)


@dataclass(frozen=True)
class Case:
    """A damaged input: which target, and the seed of its damage (None: as it is)."""

    number: int
    target: int
    seed: int | None


def _work(case: Case, base: Path, folder: Path) -> int:
    """In the child: damage the input, run the command, read what it made."""
    target = targets()[case.target]
    note = stage(target, base, folder, None if case.seed is None else Random(case.seed))
    facts = {"note": note, "command": command_line(target, base)}
    _write(folder, facts)
    import mammostream

    sys.argv = ["mammostream", *shlex.split(facts["command"])]
    try:
        mammostream.main()
    except SystemExit as end:
        facts["code"] = end.code if isinstance(end.code, int) else 0
    sys.stdout.flush()
    sys.stderr.flush()
    if facts["code"] == 0:
        try:
            facts["outcome"] = target.outcome(folder)
        except Exception as error:  # what cannot be read is another result too
            facts["outcome"] = {"rows": f"unreadable: {error}"}
    _write(folder, facts)
    return facts["code"]


def _write(folder: Path, facts: dict[str, Any]) -> None:
    (folder / "facts.json").write_text(json.dumps(facts, default=str))


def _prepare(step: Any, root: Path) -> int:
    step(root)
    return 0


def _text(folder: Path) -> str:
    both = [(folder / name).read_text(errors="replace") for name in ("stdout", "stderr") if (folder / name).is_file()]
    return "\n".join(line.rpartition("\r")[2] for line in "\n".join(both).split("\n"))


def _lines(text: str) -> set[str]:
    return {re.sub(r"[\d.]+", "#", line).strip() for line in text.splitlines()}


def judge(folder: Path, ended: Ended, target: Target, clean: dict[str, Any]) -> tuple[str, str]:
    """The verdict of a case and why."""
    facts = json.loads((folder / "facts.json").read_text()) if (folder / "facts.json").is_file() else {}
    text, note = _text(folder), facts.get("note", "")
    if (folder / MARK).exists():
        return "executed", note
    if ended.killed_for:
        return ("hang" if ended.killed_for == "time" else "memory"), f"{note}: {ended.seconds:.0f} s, {ended.memory >> 20} MB"
    if ended.code < 0:
        return "signal", f"{note}: signal {-ended.code}"
    if not facts:
        return "harness", text[-300:]
    if "Traceback (most recent call last)" in text:
        last = [line for line in text.splitlines() if re.match(r"[\w.]+(Error|Exception|Interrupt|Warning)\b", line)]
        return "traceback", f"{note}: {last[-1] if last else text[-200:]}"
    if facts["code"]:
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        tail = text.strip().splitlines()[-1] if text.strip() else ""
        if len(errors) != 1 or tail != errors[0] or len(tail) > 2000:
            return "untidy", f"{note}: exit code {facts['code']}: {tail[:200]}"
        return "ok", f"{note}: {tail}"
    noticeable = any(note.startswith(start) for start in target.noticeable)
    before, after = clean["outcome"], facts["outcome"]
    if noticeable and before["rows"] != after["rows"]:
        said = [line for line in _lines(text) - clean["lines"] if _WORD.search(line)]
        if not said and before.get("words") == after.get("words"):
            return "silent", f"{note}: another result without a word"
    return "ok", note


def _cases(count: int, seed: int) -> list[Case]:
    """`count` cases, dealt to the targets by their shares, in an order in which every part has all kinds."""
    every = targets()
    total = sum(target.share for target in every)
    cases, owed = [], 0.0
    for number, target in enumerate(every):
        owed += target.share / total * count
        while owed >= 0.5 and len(cases) < count:
            cases.append(number)
            owed -= 1
    rng = Random(seed)
    rng.shuffle(cases)
    return [Case(n, target, rng.randrange(2**60)) for n, target in enumerate(cases)]


@click.command(context_settings={"show_default": True})
@click.option("--output-dir", type=click.Path(path_type=Path), required=True, help="Folder for the inputs and the cases.")
@click.option(
    "--run", "run", type=click.Path(path_type=Path), help="A finished run of the tests' kind to damage; default: makes one."
)
@click.option("--cases", default=2000, help="Damaged inputs.")
@click.option("--part", default="0:", help="Only the cases A:B of them.")
@click.option("--seed", default=0, help="Seed of the damage.")
@click.option("--processes", default=2, help="Cases at a time.")
@click.option("--seconds", default=90.0, help="Time limit of a case in seconds.")
@click.option("--again", "again", default="", help="Only these cases, by number, with commas.")
def main(
    output_dir: Path, run: Path | None, cases: int, part: str, seed: int, processes: int, seconds: float, again: str
) -> None:
    """Damage inputs, run the commands that read them, print a table of kinds and verdicts."""
    environment()
    warm_up()
    base = output_dir.absolute() / "base"
    failed: list[int] = []
    if not (base / "complete").exists():
        base.mkdir(parents=True, exist_ok=True)
        if run is not None:
            shutil.copytree(run, base, dirs_exist_ok=True)
        for step in (make_run, complete) if run is None else (complete,):
            run_all([(0, base, partial(_prepare, step, base))], lambda _, ended: failed.append(ended.code), 1, 600)
            if failed[-1]:
                raise click.ClickException(f"the inputs could not be made: {_text(base)[-500:]}")
        (base / "complete").touch()
    start, _, stop = part.partition(":")
    chosen = _cases(cases, seed)[int(start or 0) : int(stop) if stop else None]
    if again:
        chosen = [case for case in chosen if case.number in {int(n) for n in again.split(",")}]
    clean = _clean_runs(chosen, base, output_dir / f"clean-{start}", processes)
    table = _run(chosen, base, output_dir.absolute() / "cases", clean, processes, seconds)
    print(_markdown(table))
    sys.exit(any(verdict != "ok" for counts in table.values() for verdict in counts))


def _clean_runs(cases: list[Case], base: Path, place: Path, processes: int) -> dict[int, dict[str, Any]]:
    """Run every target's undamaged input once; raises where that fails."""
    place = place.absolute()
    shutil.rmtree(place, ignore_errors=True)
    clean: dict[int, dict[str, Any]] = {}

    def ended(number: int, end: Ended) -> None:
        folder = place / str(number)
        facts = json.loads((folder / "facts.json").read_text()) if (folder / "facts.json").is_file() else {}
        if end.code or "outcome" not in facts:
            raise click.ClickException(f"the undamaged input fails: {facts}: {end}: {_text(folder)[-1500:]}")
        clean[number] = {"outcome": facts["outcome"], "lines": _lines(_text(folder))}

    jobs = [
        (n, place / str(n), partial(_work, Case(n, n, None), base, place / str(n))) for n in sorted({c.target for c in cases})
    ]
    for _, folder, _ in jobs:
        folder.mkdir(parents=True)
    run_all(jobs, ended, processes, 120)
    shutil.rmtree(place, ignore_errors=True)
    return clean


def _run(
    cases: list[Case], base: Path, place: Path, clean: dict[int, dict[str, Any]], processes: int, seconds: float
) -> dict[str, Counter[str]]:
    every, table = targets(), defaultdict(Counter)
    by_number = {case.number: case for case in cases}

    def jobs() -> Any:
        for case in cases:
            folder = place / f"{case.number:04d}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            yield case.number, folder, partial(_work, case, base, folder)

    def ended(number: int, end: Ended) -> None:
        folder, target = place / f"{number:04d}", every[by_number[number].target]
        verdict, why = judge(folder, end, target, clean[by_number[number].target])
        table[target.kind][verdict] += 1
        line = {"case": number, "kind": target.kind, "command": target.command[:40], "verdict": verdict, "why": why}
        with (place.parent / "log.jsonl").open("a") as log:
            log.write(json.dumps(line | {"seconds": round(end.seconds, 1), "mb": end.memory >> 20, "code": end.code}) + "\n")
        if verdict == "ok":
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(json.dumps(line, ensure_ascii=False), flush=True)

    run_all(jobs(), ended, processes, seconds)
    return table


def _markdown(table: dict[str, Counter[str]]) -> str:
    rows = [f"| kind | cases | {' | '.join(VERDICTS)} |", "|---" * (len(VERDICTS) + 2) + "|"]
    total: Counter[str] = sum(table.values(), Counter())
    for kind, counts in [*sorted(table.items()), ("all", total)]:
        rows.append(f"| {kind} | {counts.total()} | {' | '.join(str(counts[v]) for v in VERDICTS)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
