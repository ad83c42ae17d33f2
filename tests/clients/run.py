"""`make test-clients`: every client of the table against real servers; prints a line for each as it
comes, then the table; writes the results. Exit status 1 if any is not as its row says.

    python -m tests.clients.run [--only WORD] [--results FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from model.encoder import Encoder
from model.tasks import prefix_of
from server.settings import Settings
from tests.clients import page, suites
from tests.clients.client import SERVERS, Client
from tests.clients.environments import BUILD, ranks, results
from tests.clients.judge import Expected, Shown, faults, judge
from tests.clients.table import CLIENTS
from tests.server.processes import ServerProcess

MODEL, KEY = "nv-embed-small", "sk-of-the-clients"
PASSAGES = [
    "You can borrow books for four weeks.",
    "The canteen opens at noon.",
    "Dogs must be led. Bäume, 木, 🌲.",
]
QUESTION = "when is lunch served?"
LONG = "word " * 6000


class Servers:
    """Started when the first client wants one; one that does not start is told."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self._keys = self._folder / "keys.txt"
        self._keys.touch(mode=0o600)
        self._keys.write_text(f"{KEY}\n")
        self._urls: dict[str, str] = {}

    def url(self, name: str) -> str:
        if name not in self._urls:
            options = [str(self._keys) if word == "KEYS" else word for word in SERVERS[name]]
            options += [] if "--token-ids" in options else ["--token-ids", "reject"]  # the default
            log = self._folder / f"{name}.log"
            try:
                env = {"TIKTOKEN_CACHE_DIR": str(ranks())}
                server = ServerProcess(None, *options, log=log, env=env)
            except AssertionError:
                print(f"the server {name!r} did not start: {log.read_text()[-300:]}", flush=True)
                self._urls[name] = "http://127.0.0.1:9"
            else:
                self._stack.callback(server.stop)
                server.wait_ready()
                self._urls[name] = server.url
        return self._urls[name]


def expected() -> Expected:
    """By the model in this process: no HTTP has touched these."""
    encoder = Encoder(device="cpu", dtype="float32", threads=1)
    passages = encoder.encode([*PASSAGES, QUESTION], progress=False)
    prompt = prefix_of(Settings.model_fields["query_instruction"].default)
    query = encoder.encode([QUESTION], prompt, progress=False)
    return Expected(passages[:-1], query[0], passages[-1], passages[:-1] @ query[0])


def served(options: tuple[str, ...]) -> str:
    option = "--served-model-name"
    return options[options.index(option) + 1] if option in options else MODEL


def job(clients: list[Client], servers: Servers) -> dict[str, Any]:
    names = {client.server for client in clients}
    return {
        "servers": {
            name: {
                "url": servers.url(name),
                "key": KEY,
                "model": served(SERVERS[name]),
            }
            for name in names
        },
        "passages": PASSAGES,
        "question": QUESTION,
        "long": LONG,
        "clients": [
            {
                "name": client.name,
                "package": client.package,
                "adapter": client.adapter,
                "argument": client.argument,
                "server": client.server,
                "ranks": client.ranks,
                "give_up": bool(client.not_yet or client.refused),
            }
            for client in clients
        ],
    }


def row_of(client: Client, shown: Shown, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "client": client.name,
        "package": client.package,
        "version": found["version"],
        "passages": shown.passages,
        "side": shown.side,
        "silent": shown.silent,
        "told": list(shown.told),
        "ranks": client.ranks,
        "refused": client.refused,
        "not_yet": client.not_yet,
        "note": client.note,
        "why": re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1", shown.why)[:400],
    }


def try_clients(clients: list[Client], servers: Servers) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, what is not as it should be)."""
    right = expected()
    rows, wrong = [], []
    for module in dict.fromkeys(client.module for client in clients):
        mine = {client.name: client for client in clients if client.module == module}
        for found in results(module, job(list(mine.values()), servers)):
            client = mine[found["name"]]
            shown = judge(found, right, ranks=client.ranks)
            notes = faults(client, shown)
            rows.append(row_of(client, shown, found))
            wrong += [f"{client.name}: {note}" for note in notes]
            word = "FAIL" if notes else "not yet" if client.not_yet else "ok"
            print(f"{word:7} {client.name} {found['version']} ({found['seconds']} s)", flush=True)
            for name in ("query", "by_suffix", "by_url", "model", "long", "key") if notes else ():
                error = found.get(name, {}).get("error", "no error")
                print(f"        {name}: {error[:300]}", flush=True)
            for note in notes:
                print(f"        {note[:600]}", flush=True)
    return rows, wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="clients with this word in name or environment")
    parser.add_argument("--results", type=Path, default=BUILD / "results.json")
    options = parser.parse_args(arguments)
    modules = {client.module for client in CLIENTS}
    clients = [
        client
        for client in CLIENTS
        if (
            options.only == client.module
            if options.only in modules
            else options.only in client.name
        )
    ]
    for log in BUILD.glob("*.log"):
        log.unlink()
    started = time.monotonic()
    with ExitStack() as stack:
        servers = Servers(stack)
        rows, wrong = try_clients(clients, servers)
        ran = suites.run(servers.url, KEY, MODEL) if not options.only else []
    order = {client.name: place for place, client in enumerate(CLIENTS)}
    rows.sort(key=lambda row: order[row["client"]])
    wrong += [f"{suite['suite']}: {suite['said']}" for suite in ran if not suite["as_expected"]]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "clients": rows,
        "suites": ran,
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(page.table(result))
    waiting = sum(bool(client.not_yet) for client in clients)
    print(f"{len(rows)} clients, {waiting} of them not yet, {time.monotonic() - started:.0f} s")
    for note in wrong:
        print(f"FAIL {note[:400]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
