"""Tries the clients of one environment in turn: a job on stdin, a line of JSON for each on stdout.

It only notes what came: whether that is right is judged elsewhere (`tests/clients/judge.py`).
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

from tests.clients.adapters.ways import At, Ranks, Ways


def numbers(vector: Any) -> list[float]:
    return [float(number) for number in vector]


def attempt(what: Callable[[], Any]) -> dict[str, Any]:
    """{"value"} or {"error"}: all that the user would read, the causes included."""
    try:
        return {"value": what()}
    except (Exception, SystemExit) as error:
        return {"error": "\n".join(said(error))}


def said(error: BaseException | None) -> list[str]:
    if error is None:
        return []
    return [f"{type(error).__name__}: {error}", *said(error.__cause__)]


def tried(adapter: Callable[[At], Any], client: dict[str, Any], job: dict[str, Any]) -> Any:
    """Passages, a question in four ways, and three mistakes."""
    server = job["servers"][client["server"]]
    question, texts = job["question"], job["passages"]

    def at(path: str = "", key: str = server["key"], suffix: str = "", model: str = "") -> Any:
        model = model or server["model"]
        return adapter(At(server["url"] + path, key, model + suffix, client["argument"]))

    def passages(ways: Any, texts: list[str] = texts) -> Any:
        if isinstance(ways, Ranks):
            return numbers(ways.scores(question, texts))
        return [numbers(row) for row in ways.passages(texts)]

    def query(ways: Ways) -> list[float]:
        return numbers(ways.query(question) if ways.query else ways.passages([question])[0])

    found = {"passages": attempt(lambda: passages(at()))}
    if "error" in found["passages"] and client["give_up"]:
        return found  # nothing of it works yet: no time for its retries
    mistakes = {
        "model": attempt(lambda: passages(at(model="no-such-model"))),
        "long": attempt(lambda: passages(at(), [job["long"]])),
        "key": attempt(lambda: passages(at(key="wrong-key"))),
    }
    if client["ranks"]:
        return {**found, **mistakes}
    return {
        **found,
        **mistakes,
        "query": attempt(lambda: query(at()) if at().query else None),
        "by_suffix": attempt(lambda: query(at(suffix="-query"))),
        "by_url": attempt(lambda: query(at("/query"))),
    }


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def main() -> None:
    job = json.load(sys.stdin)
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some clients print
    module = importlib.import_module(f"tests.clients.adapters.{job['module']}")
    for client in job["clients"]:
        started = time.monotonic()
        found = tried(getattr(module, client["adapter"]), client, job)
        found |= {"name": client["name"], "version": version(client["package"])}
        found["seconds"] = round(time.monotonic() - started, 1)
        print(json.dumps(found), file=lines, flush=True)
    lines.flush()
    os._exit(0)  # some clients leave threads that would be waited for


if __name__ == "__main__":
    main()
