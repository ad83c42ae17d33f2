"""A cluster of several nodes on this machine: what runs them is this program, told to add one, to
remove it, and to stop. Its first word is the address."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.ray.program import STORE_BYTES, answering


def main(folder: str) -> None:
    with answering() as answer:
        from ray.cluster_utils import Cluster

        os.environ["RAY_TMPDIR"] = folder  # temp_dir is not all that it is asked for
        Path(folder, "ray").mkdir()
        usual = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
        head = {**usual, "num_cpus": 2, "node_ip_address": "127.0.0.1"}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        answer(cluster.address)
        added = None
        for line in sys.stdin:
            verb, _ = json.loads(line)
            if verb == "add":
                added = cluster.add_node(num_cpus=1, **usual)
            elif verb == "remove":
                cluster.remove_node(added, allow_graceful=False)
            else:
                cluster.shutdown()
            answer()
            if verb == "stop":
                return


if __name__ == "__main__":
    main(*sys.argv[1:])
