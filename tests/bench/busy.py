"""What other busy programs on the same cores cost: texts of 40 tokens through `serve` and through
`encode`, with the default number of threads, quiet and beside processes that never rest.

Threads that wait for one another by spinning lose whole time slices to such neighbours. Each
variant is a setting of the environment (`default` is none: what the product chooses itself), and,
with --against, the same in another checkout of the project. All take turns in every round; a
figure is the median of the rounds. `encode` counts its start, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from model.tokenizer import NVEmbedTokenizer
from tests.bench import report, workloads
from tests.server.processes import ROOT

_TOKENS = 40
_LOOP = "import time\nend = time.time() + 300\nwhile time.time() < end: pass"


class Variant:
    """One checkout of the project under one environment."""

    def __init__(self, name: str, checkout: Path, settings: Sequence[str]) -> None:
        self.name = name
        self._environment = {**os.environ, "PYTHONPATH": str(checkout)}
        self._environment |= dict(setting.split("=", 1) for setting in settings)
        self._runs = 0
        self._cli = [sys.executable, "-P", "-m", "server.cli"]

    @contextmanager
    def serving(self, folder: Path) -> Iterator[Variant]:
        name = self.name.replace("/", "_")[-40:]
        log, socket = folder / f"{name}.log", folder / f"{name}.sock"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*self._cli, "serve", "--uds", str(socket), "--no-access-log"],
                stderr=file,
                stdout=file,
                env=self._environment,
                cwd=folder,
            )
        transport = httpx.HTTPTransport(uds=str(socket))
        self._client = httpx.Client(base_url="http://server", transport=transport, timeout=600)
        try:
            self._wait_ready(socket, log)
            yield self
        finally:
            self._client.close()
            process.terminate()
            process.wait(60)

    def _wait_ready(self, socket: Path, log: Path) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if socket.exists() and self._client.get("/readyz").status_code == 200:
                return
            time.sleep(0.1)
        raise AssertionError(log.read_text())

    def post(self, texts: Sequence[str]) -> float:
        started = time.perf_counter()
        answer = self._client.post(
            "/v1/embeddings", json={"model": "nv-embed-small", "input": texts}
        )
        assert answer.status_code == 200, answer.text
        return time.perf_counter() - started

    def encode(self, file: Path) -> float:
        self._runs += 1
        output = file.with_name(f"{self.name}-{self._runs}.npy")
        started = time.perf_counter()
        subprocess.run(
            [*self._cli, "encode", str(file), "-o", str(output)],
            check=True,
            capture_output=True,
            env=self._environment,
            cwd=file.parent,
        )
        return time.perf_counter() - started


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that never rest; they end by themselves after five minutes."""
    loops = [subprocess.Popen([sys.executable, "-c", _LOOP]) for _ in range(processes)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--busy", type=int, default=2, help="busy processes beside")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument(
        "--variants",
        default="default",
        help="environments, one comma apart: default,OMP_WAIT_POLICY=PASSIVE,GOMP_SPINCOUNT=1000",
    )
    parser.add_argument("--against", help="another checkout, run with its defaults")
    options = parser.parse_args(arguments)
    out = report.Report("busy", __doc__ or "", report.settings_of(options))
    out.start()
    tokenizer = NVEmbedTokenizer.from_dir(workloads.SMALL)
    texts = workloads.texts_of(tokenizer, f"all-{_TOKENS}", options.texts)
    variants = [
        Variant(name, ROOT, [] if name == "default" else name.split("+"))
        for name in options.variants.split(",")
    ]
    if options.against:
        variants.append(Variant("against", Path(options.against).resolve(), []))
    seconds: dict[tuple[str, str, str], list[float]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        file = folder / "texts.txt"
        file.write_text("".join(f"{text}\n" for text in texts))
        for variant in variants:
            stack.enter_context(variant.serving(folder)).post(texts)
        for number in range(options.rounds):
            for beside, count in (("quiet", 0), ("busy", options.busy)):
                for variant in variants:
                    with busy(count):
                        for how, taken in (
                            ("serve", variant.post(texts)),
                            ("encode", variant.encode(file)),
                        ):
                            seconds.setdefault((variant.name, how, beside), []).append(taken)
            print(f"round {number + 1} of {options.rounds}", flush=True)
    out.raw = {" ".join(key): values for key, values in seconds.items()}
    middle = {key: report.median(values) for key, values in seconds.items()}
    for variant in variants:
        for how in ("serve", "encode"):
            quiet, loaded = (middle[variant.name, how, beside] for beside in ("quiet", "busy"))
            out.add(
                variant=variant.name,
                how=how,
                quiet_s=quiet,
                busy_s=loaded,
                times=loaded / quiet,
                quiet_of_first=quiet / middle[variants[0].name, how, "quiet"],
            )
            out.ratios[f"{variant.name}, {how}: busy / quiet"] = loaded / quiet
    out.finish(options.results, group="variant", label="how", value="times", unit="busy ÷ quiet")


if __name__ == "__main__":
    main()
