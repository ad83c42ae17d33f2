"""Arguments of an application of Ray Serve: what they come to, and what is refused of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from model.extras import how_to_install
from server.errors import SettingsError
from server.ray.settings import RAYS_OWN, ReplicaSettings, read
from server.settings import Settings
from tests.server.processes import ROOT


def options(**args: Any) -> dict[str, Any]:
    return read(args, {}).options()


def test_the_usual_deployment() -> None:
    found = options()
    assert found["num_replicas"] == 1
    assert "autoscaling_config" not in found
    assert found["max_ongoing_requests"] == 512
    assert found["ray_actor_options"] == {"num_cpus": 2.0, "num_gpus": 1.0}
    drain: float = Settings.model_fields["drain_timeout"].default
    assert found["graceful_shutdown_timeout_s"] > drain


def test_more_replicas_at_most_than_at_least_follow_the_load() -> None:
    found = options(min_replicas=2, max_replicas="8", target_ongoing_requests=32)
    assert "num_replicas" not in found
    assert found["autoscaling_config"]["max_replicas"] == 8  # words of `serve run` are texts
    assert found["autoscaling_config"]["target_ongoing_requests"] == 32
    assert options(min_replicas=2, max_replicas=2)["num_replicas"] == 2


def test_a_replica_on_the_cpu_takes_as_many_threads_as_it_has_cores() -> None:
    settings = read({"devices": "cpu", "num-cpus": 4}, {})
    assert settings.options()["ray_actor_options"] == {"num_cpus": 4.0, "num_gpus": 0.0}
    assert settings.threads == 4
    assert read({"devices": "cpu", "num_cpus": 0.1}, {}).threads == 1
    assert read({"devices": "cpu", "threads": 3}, {}).threads == 3
    assert read({}, {}).threads is None


def test_arguments_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("max_batch_tokens: 1\nmax_batch_seqs: 1\nmax_input_tokens: 10\nport: 9\n")
    environment = {"NV_EMBED_MAX_BATCH_TOKENS": "2", "NV_EMBED_MAX_BATCH_SEQS": "2"}
    found = read({"config": str(file), "max_batch_tokens": 3}, environment)
    assert (found.max_batch_tokens, found.max_batch_seqs, found.max_input_tokens) == (3, 2, 10)


def test_what_ray_does_is_passed_over_where_a_plain_server_may_need_it() -> None:
    environment = {"NV_EMBED_HOST": "0.0.0.0", "NV_EMBED_ROOT_PATH": "/api"}
    found = read({}, environment)
    assert (found.host, found.root_path) == ("127.0.0.1", "")
    key = "a-key-from-the-environment"
    assert read({}, {"NV_EMBED_API_KEY": key}).api_keys()[0].key == key.encode()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"max_batch_token": 5}, "unknown argument 'max_batch_token'; did you mean max_batch_to"),
        ({"max_replica": 5}, "unknown argument 'max_replica'; did you mean max_replicas?"),
        ({"port": 8000}, "port: Ray listens: set it in http_options"),
        ({"root-path": "/x"}, "root-path: Ray does that: route_prefix"),
        ({"api_key": "k" * 32}, "api_key: Ray shows arguments to all who ask"),
        ({"max_batch_tokens": "many"}, "max_batch_tokens: must be a whole number, not 'many'"),
        ({"num_gpus": 2}, "num_gpus: must be at most 1"),
        ({"num_cpus": True}, "num_cpus: must be a number, not true"),
        ({"max_replicas": 1, "min_replicas": 2}, "max_replicas=1 is less than min_replicas=2"),
        ({"target_ongoing_requests": 600}, "is more than max_ongoing_requests=512"),
        ({"model": None}, "model: a value is empty"),
        ({"devices": "cpu,cpu"}, "devices=cpu,cpu: a replica has one worker"),
        ({"devices": "cuda:1"}, "Ray chooses its GPU"),
        ({"devices": "cpu", "num_gpus": 1}, "devices=cpu would not use it"),
        ({"devices": "cuda", "num_gpus": 0}, "Ray hides all GPUs"),
        ({"max-batch-seqs": 1, "max_batch_seqs": 2}, "max_batch_seqs stands there twice"),
    ],
)
def test_what_is_refused(args: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(args, {})
    assert said in str(caught.value)


def test_names_are_those_of_the_server_or_ray() -> None:
    assert set(RAYS_OWN) <= set(Settings.model_fields)
    assert set(Settings.model_fields) < set(ReplicaSettings.model_fields)


def test_the_shipped_config_has_arguments_that_are_taken() -> None:
    config = yaml.safe_load((ROOT / "docker/ray/serve.yaml").read_text())
    (application,) = config["applications"]
    assert application["import_path"] == "server.ray.app:app"
    found = read(application["args"], {}).options()
    assert found["autoscaling_config"]["max_replicas"] == 8


def test_the_page_names_every_argument_and_what_is_not_taken() -> None:
    page = (ROOT / "docs/ray.md").read_text()
    own = ReplicaSettings.model_fields.keys() - Settings.model_fields.keys()
    assert not [name for name in (*own, *RAYS_OWN) if f"`{name}`" not in page]


def test_without_ray_it_is_said_how_to_get_it() -> None:
    with pytest.raises(SettingsError) as caught:
        import server.ray.app  # noqa: F401
    assert how_to_install("ray") in str(caught.value)
    assert "ray[data,serve]" in str(caught.value)
