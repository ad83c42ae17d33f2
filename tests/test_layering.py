"""Imports point one way: server to model, and in each package down the lists below."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lowest first: a module may import those before it. A new module gets its place here.
MODEL = [
    "errors",
    "console",
    "extras",
    "user_files",
    "batch",
    "host",
    "files",
    "config",
    "card",
    "weights",
    "fingerprint",
    "hub",
    "tokenizer_file",
    "tokenizer",
    "tasks",
    "cuda_device",
    "packing",
    "attention",
    "rotary",
    "packed_linear",
    "quantization",
    "triton_kernels",
    "fused",
    "products",
    "mistral",
    "latent_attention",
    "nv_embed",
    "loader",
    "cuda_graphs",
    "runner",
    "memory",
    "encoder",
    "checks",
    "verify",
]
SERVER = [
    "errors",
    "json_text",
    "process",
    "pace",
    "hints",
    "logs",
    "settings",
    "metrics",
    "instructions",
    "names",
    "json_fields",
    "schemas",
    "inputs",
    "byte_budget",
    "request_queue",
    "quarantine",
    "vector_cache",
    "worker",
    "start_worker",
    "supervisor",
    "batcher",
    "engine",
    "serialize",
    "middleware",
    "routes",
    "app",
    "protocol",
    "handshake",
    "lifecycle",
    "text_files",
    "vector_files",
    "parts",
    "bulk",
    "batch_files",
    "encode",
    "cli",
]
TRAINING = [
    "examples",
    "settings",
    "losses",
    "attention",
    "network",
    "adapters",
    "mistral_import",
    "export",
    "average",
    "deepen",
    "teacher",
    "initialise",
    "corpus",
    "gradient_cache",
    "states",
    "trainer",
    "sources",
    "validation_sets",
    "mining",
    "remote",
    "stages",
    "baseline",
    "metrics",
    "bm25",
    "evaluation",
    "mteb_adapter",
    "convert",
    "decontamination",
    "plot",
    "ablation",
    "commands",
]
LAYERS = {"model": MODEL, "server": SERVER, "model/training": TRAINING}
TORCH_FREE = [
    "model.tokenizer",
    "model.tasks",
    "model.hub",
    "model.fingerprint",
    "model.config",
    "model.batch",
    "model.user_files",
    "model.host",
    "model.memory",
]


def modules(package: str) -> dict[str, Path]:
    return {path.stem: path for path in (ROOT / package).glob("*.py") if path.stem != "__init__"}


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names that a file imports, wherever in it (for `from a import b`: a.b)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", LAYERS)
def test_every_module_has_its_place(package: str) -> None:
    unplaced = modules(package).keys() - set(LAYERS[package])
    assert not unplaced, (
        f"{package}/ has modules without a layer: {sorted(unplaced)}. Put each into the list "
        f"{package.upper()} of tests/test_layering.py, after all that it imports."
    )
    assert len(set(LAYERS[package])) == len(LAYERS[package])


@pytest.mark.parametrize("package", LAYERS)
def test_imports_point_down(package: str) -> None:
    order = LAYERS[package]
    wrong = []
    for name, path in modules(package).items():
        for imported in imports(path):
            inside, _, rest = imported.partition(package.replace("/", ".") + ".")
            target = rest.split(".")[0]
            if inside or target not in order:
                continue
            if order.index(target) >= order.index(name):
                wrong.append(f"{package}.{name} imports {target}")
    assert not wrong, "; ".join(wrong)


def test_the_model_knows_nothing_of_the_server() -> None:
    for name, path in (modules("model") | modules("model/training")).items():
        roots = {imported.split(".")[0] for imported in imports(path)}
        assert not roots & {"server", "asyncio", "fastapi", "uvicorn", "starlette"}, name


def test_only_the_command_knows_of_training() -> None:
    for package in ("model", "server"):
        for name, path in modules(package).items():
            used = any(imported.startswith("model.training") for imported in imports(path))
            assert used == (name == "cli"), name


def test_the_check_finds_an_import_that_points_up(tmp_path: Path) -> None:
    file = tmp_path / "low.py"
    file.write_text("def f():\n    from model import encoder\n    import model.loader as x\n")
    assert list(imports(file)) == ["model.encoder", "model.loader"]


@pytest.mark.parametrize("module", TORCH_FREE)
def test_the_front_process_needs_no_torch(module: str) -> None:
    program = (
        f"import sys, {module}; "
        "print(*sorted({'torch', 'transformers', 'bitsandbytes'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", program]
    child = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert child.stdout.strip() == ""
