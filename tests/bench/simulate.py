"""How many servers does a load need, and what do clients see? A simulation, not a measurement.

The server's own queue composes the batches, under a virtual clock: an hour of requests takes
seconds, and no model and no GPU is needed. You say what a batch costs, what the requests are like,
and how many servers there are. For each load, a share of what full batches would do, it predicts
answers a second, p50 and p99, the share of refusals (429) and of missed deadlines (504), and how
busy workers and front are. One seed, one outcome.

A batch's cost, by the first of these that is given:
  --cost 3.5:62          milliseconds a batch, microseconds a token (and a third: of an input)
  --fit batches.csv      columns tokens, seconds; inputs and batches if there
                         (`python -m tests.bench.batch_cost` measures a model's)
  --fit http://HOST:PORT a server's own /metrics, watched while its load varies
  (none)                 the shipped model, one thread, AMD EPYC (Zen 4), 2026-11-27

Examples:
  simulate --replicas 1,2,4 --loads 0.5,0.8,0.95,1.2
  simulate --cuda --cost 6:29 --max-batch-tokens 8192 --lengths all-512 --replicas 8
  simulate --requests mine.txt       a request a line: the tokens of each of its inputs
  simulate --against-server          how right is it? A real server with two workers whose batches
                                     take a known time gets the same requests at the same
                                     moments; ends with 1 when a figure is beyond its bar.
                                     --cost is then that time (100:28; see --loads, --seconds)

Left out: workers that die, clients that go, keys, priorities, the cache, the network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from model.batch import BATCH_SEQS, CPU_BATCH_TOKENS, GPU_BATCH_TOKENS, BatchLimits
from tests.bench import batch_cost, report, simulation_check, workloads
from tests.bench.batch_cost import Cost
from tests.bench.simulation import BALANCERS, Front, Outcome, Setup, poisson, simulate

SMALL_ON_ZEN4 = Path(__file__).parent / "results" / "batches-small-zen4.csv"
_FRONT = "80:2:80:40:300"
"""As in docs/benchmarks.md: 4,200 texts a second one a request, 400 requests of 32; vectors of
4,096 numbers as base64."""
_DRAWN = 5000
"""Requests that arrivals are drawn from."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.against_server:
        _against_server(options)
        return
    out = report.Report("simulate", _what(), report.settings_of(options))
    out.start()
    requests = _requests(options)
    tokens, inputs = (sum(map(of, requests)) for of in (sum, len))
    setup = _setup(options)
    print(
        f"cost of a batch: {setup.cost} (ms : us a token : us an input); "
        f"a request has {tokens / len(requests):.4g} tokens in {inputs / len(requests):.4g} inputs"
    )
    for replicas in map(int, options.replicas.split(",")):
        many = replace(setup, replicas=replicas)
        rate = many.tokens_per_s(tokens / inputs) / (tokens / len(requests))
        for load in map(float, options.loads.split(",")):
            arrivals = poisson(load * rate, options.seconds, requests, options.seed)
            out.add(load=load, servers=replicas, **_row(simulate(many, arrivals), tokens / inputs))
    out.raw = {"cost": setup.cost._asdict(), "front": setup.front._asdict()}
    out.finish(
        options.results,
        group="load",
        label="servers",
        value="p99_ms",
        unit="p99, ms",
        lines={"p99_ms": "p99, ms", "answers_per_s": "answers/s"},
    )


def _row(outcome: Outcome, mean_tokens: float) -> dict[str, float]:
    seen = simulation_check.figures(outcome)
    return {
        "requests": len(outcome),
        **seen,
        "expired": outcome.count(504) / max(1, len(outcome)),
        "worker_busy": outcome.worker_busy,
        "front_busy": outcome.front_busy,
        "batch_tokens": outcome.batch_tokens / max(1, outcome.batches),
    }


def _against_server(options: argparse.Namespace) -> None:
    out = report.Report("simulate-check", simulation_check.__doc__ or "", _check_settings(options))
    out.start()
    loads = [float(load) for load in options.loads.split(",")]
    pace = batch_cost.parse(options.cost) if options.cost else simulation_check.PACE
    setup, rows, holds = simulation_check.check(loads, options.seconds, options.seed, pace)
    for row in rows:
        out.add(**row)
        out.ratios[f"load {row['load']:g}: {row['figure']}, off"] = row["off"]
    out.raw = {"cost": setup.cost._asdict(), "front": setup.front._asdict()}
    out.finish(options.results, group="load", label="figure", value="off", unit="off")
    if not holds:
        sys.exit("beyond a bar: see NO in the table (a busy machine does that, too)")


def _check_settings(options: argparse.Namespace) -> dict[str, object]:
    return {name: getattr(options, name) for name in ("loads", "seconds", "seed", "cost")}


def _what() -> str:
    return (__doc__ or "").split("\n\n")[0]


def _setup(options: argparse.Namespace) -> Setup:
    usual = GPU_BATCH_TOKENS if options.cuda else CPU_BATCH_TOKENS
    return Setup(
        _cost(options),
        BatchLimits(options.max_batch_tokens or usual, options.max_batch_seqs),
        Front(*(1e-6 * float(part) for part in options.front.split(":"))),
        workers=options.workers,
        cuda=options.cuda,
        max_queued_tokens=options.max_queued_tokens,
        deadline=options.deadline,
        balancer=options.balancer,
        ids=options.ids,
    )


def _cost(options: argparse.Namespace) -> Cost:
    if options.cost:
        return batch_cost.parse(options.cost)
    if options.fit and options.fit.startswith(("http://", "https://")):
        samples = list(batch_cost.watched(options.fit, options.fit_seconds))
    else:
        samples = batch_cost.read_csv(Path(options.fit or SMALL_ON_ZEN4))
    cost = batch_cost.fitted(samples)
    off = batch_cost.error_of(cost, samples)
    print(f"fitted to {len(samples)} samples, of which half are within {off:.1%} of it")
    return cost


def _requests(options: argparse.Namespace) -> list[tuple[int, ...]]:
    if options.requests:
        lines = Path(options.requests).read_text().splitlines()
        return [tuple(map(int, line.split())) for line in lines if line.strip()]
    shares = dict(part.split(":") for part in options.inputs.split(","))
    counts = [int(count) for count in shares]
    weights = np.array([float(share) for share in shares.values()])
    generator = np.random.default_rng(8)
    drawn = generator.choice(counts, size=_DRAWN, p=weights / weights.sum())
    lengths = iter(workloads.lengths_of(options.lengths, int(drawn.sum())))
    return [tuple(next(lengths) for _ in range(count)) for count in drawn]


def _parser() -> argparse.ArgumentParser:
    parser = report.parser(__doc__)
    load = parser.add_argument_group("the load")
    load.add_argument(
        "--loads",
        default="0.5,0.8,1.2",
        help="shares of the tokens/s that full batches give on all workers",
    )
    load.add_argument("--lengths", default="lognormal", help="lognormal, or all-N tokens a text")
    load.add_argument(
        "--inputs", default="1:1", help="texts a request and how many such: 1:0.9,32:0.1"
    )
    load.add_argument("--requests", help="a file in place of both")
    load.add_argument("--ids", action="store_true", help="requests are token ids, not texts")
    load.add_argument("--seconds", type=float, default=40, help="for which requests arrive")
    load.add_argument("--seed", type=int, default=1)
    servers = parser.add_argument_group("the servers")
    servers.add_argument("--replicas", default="1", help="servers; several numbers are compared")
    servers.add_argument("--balancer", choices=BALANCERS, default=BALANCERS[0])
    servers.add_argument("--workers", type=int, default=1, help="of each server")
    servers.add_argument("--cuda", action="store_true", help="a full batch waits in its hands")
    servers.add_argument("--max-batch-tokens", type=int, help="8,192 with --cuda, else 1,024")
    servers.add_argument("--max-batch-seqs", type=int, default=BATCH_SEQS)
    servers.add_argument("--max-queued-tokens", type=int, default=1_000_000)
    servers.add_argument("--deadline", type=float, default=float("inf"), help="seconds a request")
    cost = parser.add_argument_group("what it costs")
    cost.add_argument("--cost", help="ms a batch : us a token [: us an input]")
    cost.add_argument("--fit", help="a CSV file, or a server's URL")
    cost.add_argument("--fit-seconds", type=float, default=60, help="to watch a server for")
    cost.add_argument(
        "--front",
        default=_FRONT,
        help="us of the front: until a request's tokens are sought, a token, writing an answer, a "
        "vector in it; and between client and front (default: %(default)s)",
    )
    parser.add_argument("--against-server", action="store_true", help="see above")
    return parser


if __name__ == "__main__":
    main()
