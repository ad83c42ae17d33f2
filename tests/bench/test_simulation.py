"""The simulation against what is known without it: queueing theory, counting, arithmetic."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from model.batch import BatchLimits
from tests.bench import batch_cost, simulate, simulation_check
from tests.bench.batch_cost import Batches, Cost
from tests.bench.simulation import Arrival, Front, Outcome, Setup, poisson
from tests.bench.simulation import simulate as run
from tests.bench.test_smoke import report_of

ONE_AT_A_TIME = Setup(Cost(0.01, 0.0), BatchLimits(1000, 1))
LENGTHS = [(n,) for n in (4, 20, 60, 200)]


def test_lone_batches_are_a_queue_with_one_server() -> None:
    """M/D/1: Poisson arrivals, constant service. Its mean wait is known (Pollaczek, Khinchine)."""
    arrivals = poisson(70, 200, [(5,)], seed=2)
    outcome = run(ONE_AT_A_TIME, arrivals)
    busy = len(arrivals) / 200 * 0.01
    assert outcome.worker_busy == pytest.approx(busy, rel=0.01)
    wait = sum(outcome.seconds) / len(outcome) - 0.01
    assert wait == pytest.approx(busy * 0.01 / (2 * (1 - busy)), rel=0.05)


@pytest.mark.parametrize("balancer", ["least-connections", "round-robin"])
def test_each_request_is_answered_or_refused(balancer: str) -> None:
    setup = replace(
        ONE_AT_A_TIME,
        replicas=3,
        workers=2,
        max_queued_tokens=100,
        balancer=balancer,
        front=Front(1e-4, 1e-6, 2e-4, 1e-5, 1e-3),
    )
    arrivals = poisson(900, 5, LENGTHS, seed=3)  # of 600 a second
    outcome = run(setup, arrivals)
    assert outcome.count(200) + outcome.count(429) == len(arrivals) == len(outcome)
    assert outcome.answers_per_s == pytest.approx(600, rel=0.03)
    assert outcome.count(429) / len(outcome) == pytest.approx(1 / 3, rel=0.1)
    assert outcome == run(setup, arrivals), "equal arguments, another outcome"
    assert arrivals == poisson(900, 5, LENGTHS, seed=3) != poisson(900, 5, LENGTHS, seed=4)


def test_below_what_it_can_do_nothing_is_refused_and_full_batches_come_above() -> None:
    setup = Setup(Cost(0.004, 60e-6), BatchLimits(1024, 256), max_queued_tokens=4000, ids=True)
    rate = setup.tokens_per_s(64) / 64
    calm, flood = (run(setup, poisson(x * rate, 20, [(64,)], seed=5)) for x in (0.7, 2))
    assert calm.count(200) == len(calm)
    assert flood.answers_per_s == pytest.approx(rate, rel=0.02)
    assert flood.batch_tokens / flood.batches > 1000 > 2 * calm.batch_tokens / calm.batches
    # Who is admitted waits for the tokens before it, nearly as many as may wait, and for its own.
    assert flood.latency(0.5) == pytest.approx(5024 / setup.tokens_per_s(64), rel=0.15)


def test_admission_goes_by_an_estimate_of_texts_and_by_the_number_of_ids() -> None:
    arrivals = [Arrival(0.0, (10,)), *(Arrival(0.001, (10,)) for _ in range(10))]
    setup = replace(ONE_AT_A_TIME, max_queued_tokens=100)  # one is at work, 10 of 10 tokens fit
    assert run(replace(setup, ids=True), arrivals).count(429) == 0
    assert run(setup, arrivals).count(429) == 1  # 80 + 12.5 fit, 90 + 12.5 do not
    lone = [Arrival(0.0, (1000,))]
    assert run(setup, lone).count(200) == 1, "nothing waits: it is admitted, whatever its size"


def test_who_waits_beyond_the_deadline_is_dropped_then() -> None:
    setup = replace(ONE_AT_A_TIME, deadline=0.035)
    outcome = run(setup, [Arrival(0.0, (5,)) for _ in range(6)])
    assert outcome.statuses == [200, 200, 200, 200, 504, 504]
    assert outcome.seconds == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.035, 0.035])


def test_the_front_does_one_thing_after_another() -> None:
    front = Front(read=0.002, write=0.003, row=0.0, wire=0.01)
    setup = Setup(Cost(0.0, 0.0), BatchLimits(1000, 1), front, replicas=1)
    lone = run(setup, [Arrival(0.0, (5,))])
    assert lone.seconds == pytest.approx([0.015])
    crowd = run(setup, poisson(400, 10, [(5,)], seed=6))
    assert crowd.done[-1] == pytest.approx(0.005 * len(crowd), rel=0.01), "200 a second"
    two = run(replace(setup, replicas=2), poisson(300, 10, [(5,)], seed=6))
    assert two.answers_per_s == pytest.approx(300, rel=0.05)


def test_long_texts_are_tokenized_beside_the_loop_by_two_threads() -> None:
    setup = Setup(Cost(0.0, 0.0), front=Front(token=1e-5))
    long, short = (300,), (20,)
    seconds = run(setup, [Arrival(0, long), Arrival(0, long), Arrival(0, long), Arrival(0, short)])
    assert seconds.seconds == pytest.approx([0.003, 0.003, 0.006, 0.0002])


@pytest.mark.parametrize("cuda", [False, True])
def test_answers_are_written_while_the_next_batch_is_at_work(cuda: bool) -> None:
    """Whichever of the two takes longer is what all of it takes."""
    arrivals = [Arrival(0.0, (10,)) for _ in range(200)]  # 20 batches
    for write, expected in ((0.0005, 20 * 0.01 + 0.005), (0.0015, 20 * 0.015 + 0.01)):
        front = Front(read=1e-9, write=write)
        setup = Setup(Cost(0.01, 0.0), BatchLimits(100, 10), front, cuda=cuda)
        assert max(run(setup, arrivals).done) == pytest.approx(expected, rel=1e-4)


def test_a_fit_finds_the_cost_again() -> None:
    cost = Cost(0.004, 60e-6, 30e-6)
    sizes = [(1, 16, 1), (1, 1024, 4), (3, 700, 60), (2, 512, 32), (5, 1024, 5)]
    samples = [
        Batches(n, tokens, inputs, n * cost.batch + cost.token * tokens + cost.input * inputs)
        for n, tokens, inputs in sizes
    ]
    assert batch_cost.fitted(samples) == pytest.approx(cost)
    assert batch_cost.error_of(cost, samples) == pytest.approx(0)
    assert batch_cost.parse("4:60:30") == pytest.approx(cost)
    with pytest.raises(ValueError, match="two sizes"):
        batch_cost.fitted([samples[0]] * 3)


def test_a_server_tells_its_batches() -> None:
    text = """# TYPE nv_embed_batch_duration_seconds histogram
nv_embed_batch_duration_seconds_bucket{le="+Inf"} 4.0
nv_embed_batch_duration_seconds_count 4.0
nv_embed_batch_duration_seconds_sum 0.5
# TYPE nv_embed_tokens_total counter
nv_embed_tokens_total 900.0
# TYPE nv_embed_inputs_total counter
nv_embed_inputs_total 30.0
"""
    found = batch_cost.totals(text)
    assert found == Batches(batches=4, tokens=900, inputs=30, seconds=0.5)
    assert batch_cost.between(Batches(1, 100, 10, 0.1), found) == Batches(3, 800, 20, 0.4)


def outcome(seconds: float, refused: int) -> Outcome:
    statuses = [200] * (100 - refused) + [429] * refused
    return Outcome(statuses, [seconds] * 100, [1.0] * 100, lasted=10)


def test_a_prediction_beyond_its_bar_is_told() -> None:
    right = simulation_check.compare(outcome(1.0, 10), outcome(1.1, 12))
    assert [one.name for one in right if not one.holds] == []
    wrong = simulation_check.compare(outcome(1.0, 10), outcome(1.2, 16))
    assert {one.name for one in wrong if not one.holds} == {"answers_per_s", "p50_ms", "refused"}
    nothing = simulation_check.compare(outcome(1.0, 10), outcome(math.nan, 100))
    assert not any(one.holds for one in nothing)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = tmp_path / "requests.txt"
    requests.write_text("12\n30 40 50\n")
    options = ["--requests", str(requests), "--seconds", "2", "--replicas", "1,2"]
    summary = report_of(simulate.main, [*options, "--loads", "0.5,1.2"], tmp_path, capsys)
    assert [(row["servers"], row["load"]) for row in summary["rows"]] == [
        (1, 0.5),
        (1, 1.2),
        (2, 0.5),
        (2, 1.2),
    ]
    assert all(row["p99_ms"] >= row["p50_ms"] > 0 for row in summary["rows"])


def test_against_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In its shortest form: that it runs. How near they come takes minutes on a quiet machine."""
    options = ["--against-server", "--loads", "0.1", "--seconds", "1", "--cost", "4:1"]
    try:
        summary = report_of(simulate.main, options, tmp_path, capsys)
    except SystemExit:  # beyond a bar
        summary = json.loads((tmp_path / "results" / "simulate-check.json").read_text())
    assert [row["figure"] for row in summary["rows"]] == list(simulation_check.BARS)
    assert all(row["measured"] > 0 for row in summary["rows"][:3])
