"""`make drill`: servers are renewed one by one behind real proxies, under 16 busy connections.

The proxies run the examples of docker/, but for their addresses, and, where it shall be seen what
the delay does, without their retries. Ends with status 1 where a request is lost that must not be,
where none is lost without the delay, or where a server that is added later gets too little; also
where a program is missing.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from tests.checkpoints import write_checkpoint
from tests.server.processes import ServerProcess, free_ports
from tests.server.questions import RUNNERS
from tests.server.steady_load import SteadyLoad

DOCKER = Path(__file__).parents[2] / "docker"
PAUSE_S = 0.02
"""Between two requests of a connection: else instant refusals would be most of what is counted."""
LEAST_REQUESTS = 1_000
LEAST_SHARE = 0.3
PATIENCE_S = 30.0
DELAY = ("--drain-delay", "3")
Proxy = Callable[[Path, list[int], bool], contextlib.AbstractContextManager[str]]
"""In a folder, with the ports of itself and of both servers; bare: without its retries."""


def main() -> int:
    missing = [tool for tool in ("haproxy", "nginx") if shutil.which(tool) is None]
    if missing:
        print(f"missing: {', '.join(missing)}; Debian: apt-get install {' '.join(missing)}")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        drill = _Drill(Path(folder))
        wrong = [
            *drill.swaps("HAProxy, --drain-delay 3, no retries", haproxy, DELAY, bare=True),
            *drill.swaps("HAProxy, no delay, no retries", haproxy, (), bare=True, loses=True),
            *drill.swaps("HAProxy as in the example", haproxy, DELAY),
            *drill.swaps("nginx as in the example", nginx, DELAY),
            *drill.swaps("nginx, no delay, no retries", nginx, (), bare=True, loses=True),
            *drill.newcomer("--max-connection-age 2", ("--max-connection-age", "2")),
            *drill.newcomer("no age", (), finds=False),
        ]
    print("\n".join(wrong) or "every swap went as it should")
    return 1 if wrong else 0


class _Drill:
    """In one folder, with one model."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._checkpoint = write_checkpoint(folder / "golden")
        self._starts = 0

    def start(self, port: int, options: tuple[str, ...]) -> ServerProcess:
        self._starts += 1
        given = ("--runner", f"{RUNNERS}Hashing", "--no-access-log", "--port", f"{port}", *options)
        log = self._folder / f"log-{self._starts}"
        return ServerProcess(self._checkpoint, *given, log=log).wait_ready()

    def swaps(
        self,
        title: str,
        proxy: Proxy,
        options: tuple[str, ...],
        *,
        bare: bool = False,
        loses: bool = False,
    ) -> list[str]:
        """Renew both servers, one after the other. -> what was wrong."""
        ports = free_ports(3)
        servers = {port: self.start(port, options) for port in ports[1:]}
        try:
            with proxy(self._folder, ports, bare) as url, _loaded(url) as load:
                time.sleep(1)
                for port, server in list(servers.items()):
                    if server.stop() != 0:
                        return [f"{title}: a server ended badly:\n{server.log}"]
                    servers[port] = self.start(port, options)
                    time.sleep(2.5)  # the proxy has to find it again
        finally:
            for server in servers.values():
                server.stop()
        lost = load.seen.total() - load.seen["200"]
        print(f"{title}: {lost} of {load.seen.total()} requests lost {dict(load.seen)}")
        wrong = []
        if load.seen.total() < LEAST_REQUESTS:
            wrong.append(f"{title}: only {load.seen.total()} requests")
        if bool(lost) != loses:
            wrong.append(f"{title}: {lost} requests lost")
        return wrong

    def newcomer(self, title: str, options: tuple[str, ...], *, finds: bool = True) -> list[str]:
        """A second server appears behind what only spreads connections, as a Service does."""
        ports = free_ports(3)
        first = self.start(ports[1], options)
        try:
            with connections_only(self._folder, ports) as url, _loaded(url) as load:
                time.sleep(2)
                second = self.start(ports[2], options)
                try:
                    time.sleep(5)
                    before = [_answered(server) for server in (first, second)]
                    time.sleep(8)
                    after = [_answered(server) for server in (first, second)]
                finally:
                    second.stop()
        finally:
            first.stop()
        gained = [new - old for old, new in zip(before, after, strict=True)]
        share = gained[1] / sum(gained)
        print(f"{title}: a server added later got {share:.0%} of {sum(gained):.0f} requests")
        if (share >= LEAST_SHARE) == finds:
            return []
        return [f"{title}: a server added later got {share:.0%} {dict(load.seen)}"]


def _loaded(url: str) -> SteadyLoad:
    return SteadyLoad(url, pause=PAUSE_S, timeout=30)


def _answered(server: ServerProcess) -> float:
    return server.metric('nv_embed_requests_total{route="embeddings",status="200"}')


# The proxies: in front of ports[1:], at ports[0]


def _proxy_text(name: str, ports: list[int]) -> str:
    text = (DOCKER / name).read_text()
    for server, port in zip("ab", ports[1:], strict=True):
        assert f" {server}:8000" in text
        text = text.replace(f" {server}:8000", f" 127.0.0.1:{port}")
    return text


@contextlib.contextmanager
def haproxy(folder: Path, ports: list[int], bare: bool) -> Iterator[str]:
    """bare: without asking another server after a 503."""
    text = _proxy_text("haproxy.cfg", ports).replace("bind :8000", f"bind 127.0.0.1:{ports[0]}")
    if bare:
        text, removed = re.subn(r"^ *retry-on .*\n", "", text, flags=re.M)
        assert removed == 1
    (folder / "haproxy.cfg").write_text(text)
    with _running(["haproxy", "-db", "-f", f"{folder}/haproxy.cfg"], folder, ports[0]) as url:
        yield url


@contextlib.contextmanager
def nginx(folder: Path, ports: list[int], bare: bool) -> Iterator[str]:
    """Likewise."""
    text = _proxy_text("nginx.conf", ports).replace("listen 8000", f"listen 127.0.0.1:{ports[0]}")
    own = "".join(
        f"{kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    text = text.replace("http {\n", f"http {{\naccess_log off;\n{own}")
    if bare:
        text, removed = re.subn(r"proxy_next_upstream [^;]*;", "proxy_next_upstream error;", text)
        assert removed == 1
    (folder / "nginx.conf").write_text(text)
    process = f"daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx.log;"
    command = ["nginx", "-p", str(folder), "-c", f"{folder}/nginx.conf", "-g", process]
    with _running(command, folder, ports[0]) as url:
        yield url


@contextlib.contextmanager
def connections_only(folder: Path, ports: list[int]) -> Iterator[str]:
    """It looks at no request, and takes servers in turn."""
    (folder / "tcp.cfg").write_text(f"""
defaults
  mode tcp
  timeout connect 2s
  timeout client 60s
  timeout server 60s
  option redispatch 1
listen all
  bind 127.0.0.1:{ports[0]}
  balance roundrobin
  option httpchk GET /readyz
  default-server check inter 500ms fall 1 rise 1
  server a 127.0.0.1:{ports[1]}
  server b 127.0.0.1:{ports[2]}
""")
    with _running(["haproxy", "-db", "-f", f"{folder}/tcp.cfg"], folder, ports[0]) as url:
        yield url


@contextlib.contextmanager
def _running(command: list[str], folder: Path, port: int) -> Iterator[str]:
    with (folder / f"{command[0]}.out").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not _leads_somewhere(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit((folder / f"{command[0]}.out").read_text())
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def _leads_somewhere(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/readyz").status_code == 200
    return False


if __name__ == "__main__":
    sys.exit(main())
