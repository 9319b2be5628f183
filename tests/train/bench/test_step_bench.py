"""``mammostream bench step``: rungs take the same step, and the command measures them."""

from __future__ import annotations

import json

import pytest
import torch

from mammostream.train.bench import step as step_bench
from mammostream.train.bench.ladder import RUNGS, Task
from mammostream.train.bench.step import Result

TASK = Task("resnet18_narrow", batch_size=2, tile_size=32, device="cpu", steps=1, warmup=2, rounds=1)


@pytest.mark.parametrize("name", ["channels-last", "sync-free", "fused", "channels-8", "space-to-depth"])
def test_rungs_take_the_same_step(name):
    """Nobody is timed for less work: the same gradients, and online network and target move."""
    torch.manual_seed(3)
    views = tuple(torch.randn(8, 1, 64, 64) for _ in range(2))
    gradients = {}
    for rung in ("fp32", name):
        contender = step_bench._Contender(Task(**{**vars(TASK), "warmup": 0}), RUNGS[rung])
        contender._batches = iter([views])
        state = contender._state
        before = {key: tensor.clone() for key, tensor in state.model.state_dict().items()}
        contender.step()
        moved = {key: tensor - before[key] for key, tensor in state.model.state_dict().items()}
        # AdamW's first moment is the clipped gradient, but for a factor.
        gradients[rung] = {
            key: state.optimizer.state[parameter]["exp_avg"]
            for key, parameter in state.model.named_parameters()
            if parameter.requires_grad
        }
        for key, gradient in gradients[rung].items():
            assert gradient.any()
            if key.startswith(("backbone.", "projection_head.")):
                target = key.replace(".", "_momentum.", 1)
                torch.testing.assert_close(moved[target], (1 - 0.996) * moved[key], rtol=0.1, atol=2e-7, msg=key)
                assert moved[key].abs().max() > 1e-6
    one, other = (torch.cat([gradient.flatten() for gradient in gradients[rung].values()]) for rung in gradients)
    assert (one - other).norm() < 0.05 * one.norm()  # rounding grows through 20 batch norms of few values
    assert one.norm() > 0.01


def test_measuring_the_step(mammostream, tmp_path, road):
    page = tmp_path / "results/step.md"
    outcome = mammostream(
        "bench step --device cpu --arch resnet18_narrow --tile-size 32 --batch-size 2,4 --steps 1 --rounds 1 "
        f"--rungs naive fused cuda-graphs real-data --shards {road.shards} --profile fused --output {page}"
    )
    assert outcome.code == 0, outcome.err
    rows = json.loads(page.with_suffix(".json").read_text())["rows"]
    assert [(row["batch_size"], row["rung"]) for row in rows] == [
        (batch, rung) for batch in (2, 4) for rung in ("naive", "fused", "cuda-graphs", "real-data")
    ]
    for row in rows:
        if row["rung"] == "cuda-graphs" and not torch.cuda.is_available():
            assert row["failure"] == "BadInput: --cuda-graphs need a GPU"
            assert row["rates"] == []
            continue
        assert row["failure"] == ""
        assert len(row["rates"]) == 1
        assert row["pairs_per_second"] > 0
        assert (row["data_wait"] is None) == (row["rung"] != "real-data")
        assert row["mfu"] is None  # of a CPU
        if row["rung"] == "naive":
            assert row["times_naive"] == 1
    text = page.read_text()
    assert "resnet18_narrow on two views of 32×32 pixels, cpu, fp32" in text
    assert "**failed**: BadInput: --cuda-graphs need a GPU" in text
    assert str(road.root) not in text
    assert str(tmp_path) not in text
    assert "aten::" in page.with_suffix(".profile.txt").read_text()


def test_ratios_are_taken_round_by_round_and_figures_by_the_pair():
    results = {
        "naive": Result(rates=[10, 1, 4], peak_bytes=2 * 2**30),
        "fused": Result(rates=[20, 3, 10], waits=[0.1, 0.3, 0.2], peak_bytes=2**30),
        "compile": Result(failure="OutOfMemoryError: CUDA | out of memory"),
    }
    rows = step_bench.rows(TASK, results, 10**9)
    assert [row["times_naive"] for row in rows] == [1, 2.5, None]
    lines = step_bench.table(rows).splitlines()[2:]
    assert "| 4.00 | 1.00-10.00 | 1.00 | - | 2.00 | 1024 | - |" in lines[0]
    assert "| 10.00 | 3.00-20.00 | 2.50 | - | 1.00 | 512 | 20.0 |" in lines[1]
    assert "**failed**: OutOfMemoryError: CUDA / out of memory; torch.compile" in lines[2]


def test_a_rung_that_fails_half_way_keeps_its_turns(monkeypatch):
    turn, calls = step_bench._Contender.turn, []

    def fail_in_the_second(self, result):
        calls.append(self._rung)
        if calls.count(RUNGS["fused"]) == 2 and self._rung is RUNGS["fused"]:
            raise torch.OutOfMemoryError("out of memory")
        turn(self, result)

    monkeypatch.setattr(step_bench._Contender, "turn", fail_in_the_second)
    task = Task(**{**vars(TASK), "rounds": 3})
    results = step_bench.measure(task, ["fused", "space-to-depth"])
    assert len(results["fused"].rates) == 1
    assert results["fused"].failure == "OutOfMemoryError: out of memory"
    assert len(results["space-to-depth"].rates) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rungs fussed", "there is no rung 'fussed' (did you mean 'fused'?)"),
        ("--rungs real-data", "rung 'real-data' needs --shards"),
        ("--profile gone", "there is no rung 'gone'"),
        ("--batch-size 1", "--batch-size 1: give whole numbers from 2 on"),
        ("--output step.txt", "step.txt is no Markdown page"),
        ("--shards gone", "gone does not exist"),
    ],
)
def test_bad_input(mammostream, options, message):
    outcome = mammostream(f"bench step --device cpu {options}")
    assert outcome.code == 2
    assert message in outcome.error


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_every_rung_runs_on_a_gpu():
    task = Task("resnet18_narrow", batch_size=8, tile_size=64, device="cuda", steps=2, warmup=3, rounds=2)
    names = step_bench.default_rungs(task)
    results = step_bench.measure(task, names)
    assert "cuda-graphs" in names
    assert {name: result.failure for name, result in results.items()} == dict.fromkeys(names, "")
    assert all(result.peak_bytes > 2**20 for result in results.values())
    assert "Self CUDA" in step_bench.profile(task, "fused")
