"""A run of `nv-embed gpu-check`: the steps of the plan, their outcomes on the terminal and in the
report. Torch-free: a fault on the device cannot end it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.errors import UnsupportedError
from model.hub import ModelSource
from model.verify import plan
from model.verify.conduct import Outcome, Step, conduct
from model.verify.plan import Effort
from model.verify.report import Report


@dataclass(frozen=True, slots=True)
class Options:
    """What is checked, how, and where the report goes."""

    source: ModelSource
    device: str
    attention: str
    folder: Path
    effort: Effort = plan.WHOLE
    server: str | None = None  # "module:function" of the step that runs a server
    within: str | None = None  # "module:function" of a context that each process enters
    runner: str | None = None  # "module:factory" of the runner in the server


def run(options: Options) -> int:
    """Exit status: 0 all well, 1 some step failed, 130 after Ctrl-C. Raises UnsupportedError where
    there is no device. The report is there each time."""
    source, effort = options.source, asdict(options.effort)
    facts = {"model": source.model_id, "revision": source.revision, "effort": effort}
    facts |= {"device": options.device, "within": options.within}
    report = Report(options.folder, facts)
    report.write()
    print(f"checking {source.model_id} on {options.device}", flush=True)
    status, code = "error", 1
    try:
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
            bad = _all_steps(options, report, Path(work))
        if not bad:
            status, code = "done", 0
        print(f"{bad} steps went wrong" if bad else "all is well")
    except KeyboardInterrupt:
        status, code = "interrupted", 130
        print("\ninterrupted")
    finally:
        report.finish(status)
        print(f"the report, {status}; attach this to an issue: {report.path}", flush=True)
    return code


def _all_steps(options: Options, report: Report, work: Path) -> int:
    """The number of steps that went wrong."""
    source = options.source
    job: dict[str, Any] = {
        "model_id": source.model_id,
        "path": str(source.path.resolve()),
        "revision": source.revision,
        "family": source.family,
        "device": options.device,
        "attention": options.attention,
        "base": "auto",
        "work": str(work),
        "within": options.within,
        "runner": options.runner,
    }
    log, bad = work / "log", 0
    for outcome in conduct(plan.first_steps(), job, log, _begin):
        if outcome.result and "serves_in" in outcome.result:
            report.name_card(outcome.result["name"])
            job["base"] = outcome.result["serves_in"]
        elif outcome.step.name == "machine":
            trouble = _headline(outcome)
        bad += _end(report, outcome)
    if job["base"] == "auto":  # without a device there is nothing to go on with
        raise UnsupportedError(trouble)
    steps = list(plan.steps(options.effort, job["base"], options.server))
    return bad + sum(_end(report, outcome) for outcome in conduct(steps, job, log, _begin))


def _begin(step: Step) -> None:
    print(f"{step.name:<28} ", end="", flush=True)


def _end(report: Report, outcome: Outcome) -> bool:
    """Whether it went wrong."""
    report.add(outcome.step.name, outcome.status, outcome.seconds, outcome.result, outcome.error)
    line = f"{outcome.status:<8} {outcome.seconds:6.1f} s  {_headline(outcome)}"
    print(line.rstrip(), flush=True)
    return outcome.status in ("failed", "error")


def _headline(outcome: Outcome) -> str:
    """What a person wants to see at once."""
    if outcome.error:
        lines = outcome.error.strip().splitlines()
        named = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
        return (named or lines)[-1][:200]
    return ", ".join(_figures(outcome.result or {}))[:200]


def _figures(result: Mapping[str, Any]) -> list[str]:
    checks = result.get("checks", ())
    figures = [
        f"{check['name']}: {check['note'] if check['status'] == 'skipped' else check['got']}"
        for check in checks
    ]
    if len(checks) > 2:
        good = sum(check["status"] == "passed" for check in checks)
        figures = [f"{good} of {len(checks)} checks passed"]
        figures += [check["name"] for check in checks if check["status"] == "failed"]
    for key, unit in (("name", ""), ("tokens_per_s", " tokens/s"), ("p50_ms", " ms")):
        value = result.get(key)
        if value is not None:
            figures.append(f"{value:,.4g}{unit}" if isinstance(value, float) else f"{value}{unit}")
    return figures
