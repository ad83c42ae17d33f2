"""Imports point one way: server to model, and in each package down the table of tests/layers.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.layers import ROOT, WINGS, imports, layers, modules, uses, wing_of

PACKAGES = list(layers())
TORCH_FREE = [
    "model.tokenizer",
    "model.tasks",
    "model.hub",
    "model.fingerprint",
    "model.config",
    "model.batch",
    "model.user_files",
    "model.platform.resources",
    "model.fitting",
    "model.families",
    "model.weights.names",
    "server.cli",
    "server.http.lifecycle",
    "server.ray.replica",
]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_has_its_place(package: str) -> None:
    order = layers()[package]
    unplaced = modules(package).keys() - set(order)
    assert not unplaced, (
        f"{package} has modules without a layer: {sorted(unplaced)}. Put each into the table of "
        "tests/layers.py, after all that it imports."
    )
    assert set(order) == modules(package).keys(), "the table names what is no more"
    assert len(set(order)) == len(order)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down(package: str) -> None:
    order = layers()[package]
    wrong = [
        f"{name} imports {target}"
        for name, path in modules(package).items()
        for target in uses(path, order)
        if order.index(target) >= order.index(name)
    ]
    assert not wrong, "; ".join(wrong)


def test_wings_use_what_the_table_allows() -> None:
    known = layers()["server"]
    wrong = []
    for name, path in modules("server").items():
        wing = wing_of(name)
        for target in uses(path, known):
            if wing_of(target) not in ("", wing, *WINGS[wing]):
                wrong.append(f"{name} imports {target}")
    assert not wrong, "; ".join(wrong)


def test_dialects_know_the_engine_by_its_interface_alone() -> None:
    known = layers()["server"]
    for name, path in modules("server").items():
        if wing_of(name) == "api":
            of_engine = {used for used in uses(path, known) if wing_of(used) == "engine"}
            assert of_engine <= {"server.engine.interface"}, name


def test_the_model_knows_nothing_of_the_server() -> None:
    packages = [package for package in PACKAGES if package != "server"]
    for name, path in (item for package in packages for item in modules(package).items()):
        roots = {imported.split(".")[0] for imported in imports(path)}
        assert not roots & {"server", "asyncio", "fastapi", "uvicorn", "starlette"}, name


def test_only_its_commands_know_of_training() -> None:
    names = ("train", "mine", "synthesize", "evaluate", "prune")
    commands = [f"server.cli.{name}" for name in names]
    for package in ("model", "server"):
        for name, path in modules(package).items():
            used = any(imported.startswith("model.training") for imported in imports(path))
            assert used == (name in commands), name


def test_the_check_finds_an_import_that_points_up(tmp_path: Path) -> None:
    file = tmp_path / "low.py"
    file.write_text(
        "def f():\n    from model import encoder\n    import model.weights.loader as x\n"
    )
    assert list(imports(file)) == ["model.encoder", "model.weights.loader"]
    file.write_text("from server.api import names, openai\nimport server.engine.batcher\n")
    found = uses(file, layers()["server"])
    assert found == {"server.api.names", "server.api.openai", "server.engine.batcher"}


@pytest.mark.process
@pytest.mark.parametrize("module", TORCH_FREE)
def test_the_front_process_needs_no_torch_and_no_traces(module: str) -> None:
    program = (
        f"import sys, {module}; "
        "not_ours = {'torch', 'transformers', 'bitsandbytes', 'opentelemetry.sdk'}; "
        "print(*sorted(not_ours & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", program]
    child = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert child.stdout.strip() == ""
