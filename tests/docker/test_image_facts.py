"""What `make image-check` would call wrong, without an image."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from tests.docker import image_facts
from tests.docker.image_facts import Point

LOCKED = {"torch": "2.13.0", "typing_extensions": "4.16.0"}
PROCESS = dict.fromkeys(image_facts.CAPABILITIES, "0" * 16) | {
    "Uid": "10001\t10001\t10001\t10001",
    "NoNewPrivs": "1",
}
SEEN: dict[str, Any] = {
    "compilers": [],
    "writable": ["/tmp", "/cache"],
    "read_only": True,
    "packages": {"torch": "2.13.0+cpu", "typing-extensions": "4.16.0", "nv-embed-server": "1"},
    "processes": [PROCESS, PROCESS],
}
INSPECTED: dict[str, Any] = {
    "Size": 1_300_000_000,
    "Config": {"User": "10001:10001"},
    "HealthCheck": {"Test": ["CMD", "python", "-I", "/opt/nv-embed/healthcheck.py"]},
}


def wrong(points: list[Point]) -> list[str]:
    return [point.name for point in points if not point.right]


def test_an_image_as_it_should_be() -> None:
    assert wrong([*image_facts.of_image(INSPECTED)]) == []
    assert wrong([*image_facts.of_inside(SEEN, LOCKED)]) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"Size": 2_000_000_001}, "size"),
        ({"Config": {}}, "its user, by number"),
        ({"Config": {"User": "0:0"}}, "its user, by number"),
        ({"Config": {"User": "nv-embed"}}, "its user, by number"),
        ({"HealthCheck": None}, "its health check"),
    ],
)
def test_faults_of_an_image(change: dict[str, Any], expected: str) -> None:
    assert wrong([*image_facts.of_image(INSPECTED | change)]) == [expected]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"processes": [PROCESS, PROCESS | {"Uid": "0 0 0 0"}]}, "users of its processes"),
        ({"processes": [PROCESS, PROCESS | {"CapBnd": "0000000000000400"}]}, "capabilities"),
        ({"processes": [PROCESS, PROCESS | {"NoNewPrivs": "0"}]}, "no new privileges"),
        ({"read_only": False}, "root file system"),
        ({"writable": ["/tmp", "/cache", "/opt"]}, "what can be written"),
        ({"writable": ["/tmp"]}, "what can be written"),
        ({"compilers": ["/usr/bin/gcc"]}, "compilers"),
    ],
)
def test_faults_inside(change: dict[str, Any], expected: str) -> None:
    assert wrong([*image_facts.of_inside(SEEN | change, LOCKED)]) == [expected]


@pytest.mark.parametrize("package", ["nvidia-cublas", "nvidia_nccl_cu13", "triton", "cuda-toolkit"])
def test_packages_for_gpus(package: str) -> None:
    seen = deepcopy(SEEN)
    seen["packages"][package] = "1"
    expected = ["packages for GPUs", "packages unlike the lock file"]
    assert wrong([*image_facts.of_inside(seen, LOCKED)]) == expected


@pytest.mark.parametrize("locked", [LOCKED | {"torch": "2.12.0"}, LOCKED | {"regex": "1"}])
def test_other_packages_than_locked(locked: dict[str, str]) -> None:
    assert wrong([*image_facts.of_inside(SEEN, locked)]) == ["packages unlike the lock file"]


def test_vectors() -> None:
    ours = [[0.6, 0.8], [1.0, 0.0]]
    assert image_facts.of_vectors(ours, ours).right
    assert image_facts.of_vectors(ours, [[0.6, 0.8], [1.0, 9e-7]]).right
    for theirs in ([[0.6, 0.8], [1.0, 2e-6]], [[0.6, 0.8], [1.0, float("nan")]], ours[:1], []):
        assert not image_facts.of_vectors(ours, theirs).right
    assert not image_facts.of_vectors([], []).right


def test_every_package_of_the_lock_file_is_read() -> None:
    assert image_facts.locked_versions("# none\na-b==1.0\nc_d.e==2\n") == {
        "a-b": "1.0",
        "c_d.e": "2",
    }
