"""A cluster of Ray Serve in a process of its own, for tests/ray/run.py: this is that process's
program, and `Cluster` its other end.

The program reads a line of JSON for each thing that it shall do, and answers with one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARK = "RAY_TRIAL"
"""A variable that all of a cluster's processes inherit, by which they are found."""
APPLICATION = "nv-embed"
PATIENCE_S = 120.0
STORE_BYTES = 100 * 2**20
Config = dict[str, Any]
"""Of Serve, as in docker/ray/serve.yaml."""


class Cluster:
    """See the module."""

    def __init__(self, folder: Path, metrics_port: int, environment: Mapping[str, str]) -> None:
        self.mark = f"{os.getpid()}-{folder.name}"
        self.log_file = folder / "log"
        command = [sys.executable, "-P", "-m", "tests.ray.cluster", str(folder), str(metrics_port)]
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **environment, MARK: self.mark, "HOME": str(folder)},
            )
        self._answer()

    def deploy(self, config: Config) -> None:
        """Returns at once."""
        self._tell("deploy", config)

    def status(self) -> dict[str, Any]:
        """Application -> status, message, and how many of its replicas run."""
        answer: dict[str, Any] = self._tell("status")
        return answer

    def wait(self, status: str, application: str = APPLICATION, replicas: int = 0) -> str:
        """-> the application's message."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            found = self.status().get(application, {})
            if found.get("status") == status and found["replicas"] >= replicas:
                return str(found["message"])
            time.sleep(0.25)
        raise AssertionError(f"{application} is not {status}: {self.status()}\n{self.log}")

    def stop(self) -> None:
        if self._process.poll() is None:
            self._tell("stop")
        self._process.wait(PATIENCE_S)

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")[-5000:]

    def processes(self, title: str = "") -> list[int]:
        """Ids of all its processes that run, or of those whose command begins so."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                said = (folder / "environ").read_bytes().split(b"\0")
                command = (folder / "cmdline").read_text()
                zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            if f"{MARK}={self.mark}".encode() in said and command.startswith(title) and not zombie:
                found.append(int(folder.name))
        return sorted(found)

    def memory(self) -> int:
        """Bytes of all its processes; what several share is counted once."""
        total = 0
        for pid in self.processes():
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        return total

    def replicas(self) -> list[int]:
        return self.processes("ray::ServeReplica:")

    def _tell(self, verb: str, what: Any = None) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([verb, what]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the cluster's program has ended ({self._process.poll()}):\n{self.log}"
        return json.loads(line)


@contextmanager
def _answers() -> Iterator[Any]:
    """A file for answers alone: whatever else prints goes to the log."""
    with os.fdopen(os.dup(1), "w") as file:
        os.dup2(2, 1)
        yield file


def main(folder: str, metrics_port: str) -> None:
    with _answers() as out:

        def answer(what: Any = None) -> None:
            out.write(json.dumps(what) + "\n")
            out.flush()

        import ray
        from ray import serve
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            _temp_dir=folder,
            _node_ip_address="127.0.0.1",
            _metrics_export_port=int(metrics_port),
        )
        answer()
        for line in sys.stdin:
            verb, what = json.loads(line)
            if verb == "deploy":
                schema = ServeDeploySchema.parse_obj(what)
                serve.start(
                    proxy_location=schema.proxy_location,
                    http_options=schema.http_options.dict(),
                )
                _get_global_client().deploy_apps(schema, _blocking=False)
                answer()
            elif verb == "status":
                answer(
                    {
                        name: {
                            "status": app.status.value,
                            "message": app.message,
                            "replicas": sum(
                                one.replica_states.get("RUNNING", 0)
                                for one in app.deployments.values()
                            ),
                        }
                        for name, app in serve.status().applications.items()
                    }
                )
            else:
                serve.shutdown()
                ray.shutdown()
                answer()
                return


if __name__ == "__main__":
    main(*sys.argv[1:])
