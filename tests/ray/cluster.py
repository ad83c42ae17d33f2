"""A cluster of Ray Serve in a process of its own: this is that process's program, and `Cluster` its
other end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.ray.program import PATIENCE_S, STORE_BYTES, Program, answering

APPLICATION = "nv-embed"
Config = dict[str, Any]
"""Of Serve, as in docker/ray/serve.yaml."""


class Cluster(Program):
    """See the module."""

    def __init__(self, folder: Path, metrics_port: int, environment: Mapping[str, str]) -> None:
        super().__init__("tests.ray.cluster", folder, [str(metrics_port)], environment)

    def deploy(self, config: Config) -> None:
        """Returns at once."""
        self.tell("deploy", config)

    def status(self) -> dict[str, Any]:
        """Application -> status, message, and how many of its replicas run."""
        answer: dict[str, Any] = self.tell("status")
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

    def replicas(self) -> list[int]:
        return self.processes("ray::ServeReplica:")


def main(folder: str, metrics_port: str) -> None:
    with answering() as answer:
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
