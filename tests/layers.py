"""Which module may import which: the one table that the layering test and `make graph` read.

Lowest first: a module may import those before it, of its own list and of the wings below its own.
A new module gets its place here, after all that it imports.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent

MODEL = [
    "errors",
    "console",
    "extras",
    "user_files",
    "progress",
    "html_report",
    "batch",
    "chunks",
    "platform.resources",
    "files",
    "prompts",
    "families",
    "sentence_transformers_files",
    "detection",
    "config",
    "card",
    "weights.headers",
    "weights.names",
    "fingerprint",
    "hub",
    "tokenizer_file",
    "tokenizer",
    "tasks",
    "sentence_transformers_export",
    "platform.cuda_device",
    "packing",
    "attention.cpu",
    "attention.kernels",
    "rotary",
    "linear.packed_linear",
    "linear.quantization",
    "operations",
    "triton_kernels",
    "fused",
    "platform.products",
    "backbone",
    "poolers",
    "embedder",
    "weights.checkpoint",
    "weights.loader",
    "cuda_graphs",
    "runner",
    "fitting",
    "encoder",
]
SERVER = {  # by wing; "" are the files on top
    "": ["errors", "turns", "interpreter", "logs", "api_keys", "settings", "configuration"],
    "engine": [
        "pace",
        "interface",
        "inputs",
        "tokenizing",
        "tallies",
        "worker_tallies",
        "loop_lag",
        "metrics",
        "key_shares",
        "key_turns",
        "request_queue",
        "quarantine",
        "vector_cache",
        "devices",
        "wire",
        "worker",
        "start_worker",
        "worker_process",
        "worker_link",
        "supervisor",
        "pending_answer",
        "batches_out",
        "averaging",
        "batcher",
        "engine",
    ],
    "api": [
        "json_text",
        "json_fields",
        "hints",
        "byte_budget",
        "vector_format",
        "request_context",
        "openai_errors",
        "chunks",
        "wire",
        "detection",
        "token_ids",
        "schemas",
        "dialect_request",
        "answer_schemas",
        "instructions",
        "names",
        "parsing",
        "encoding_options",
        "serialize",
        "disconnects",
        "body",
        "answers",
        "embedding",
        "routing",
        "openai",
        "cohere",
        "tei",
        "ollama",
        "rerank",
        "admin",
        "openapi",
    ],
    "http": [
        "file_limit",
        "request_head",
        "connection",
        "tls",
        "listener",
        "gate",
        "request_record",
        "trace_export",
        "trace_target",
        "tracing",
        "refusals",
        "pages",
        "app",
        "lifecycle",
    ],
    "offline": [
        "part",
        "kinds",
        "sources",
        "places",
        "stores",
        "inputs",
        "times",
        "parquet_files",
        "text_files",
        "slices",
        "columns",
        "parquet_footer",
        "vector_files",
        "kept_rows",
        "notes",
        "parts",
        "ledger",
        "joined",
        "job",
        "shards",
        "manifest",
        "texts",
        "batch_files",
        "output",
        "reader",
        "earlier",
        "shard_writer",
        "crew",
        "bulk",
        "call",
        "encode",
    ],
    "ray": ["settings", "metrics", "replica", "app", "actors"],
    "cli": [
        "streams",
        "parsing",
        "flags",
        "options",
        "serve",
        "download",
        "encode",
        "verify",
        "gpu_check_server",
        "gpu_check",
        "train",
        "mine",
        "synthesize",
        "evaluate",
        "prune",
        "export",
        "openapi",
        "command_line",
        "__main__",
    ],
}
WINGS = {  # which others each may use, beside the files on top
    "": (),
    "engine": (),
    "api": ("engine",),
    "http": ("api", "engine"),
    "offline": ("api", "engine"),
    "ray": ("http", "offline", "api", "engine"),
    "cli": ("http", "offline", "ray", "api", "engine"),
}
TRAINING = [
    "examples",
    "settings",
    "losses",
    "attention",
    "network",
    "compiled",
    "adapters",
    "mistral_import",
    "export",
    "average",
    "deepen",
    "pruning",
    "teacher",
    "words",
    "align",
    "initialise",
    "smollm2",
    "case",
    "corpus",
    "gradient_cache",
    "objective",
    "states",
    "optimizers",
    "metrics",
    "trainer",
    "sources",
    "questions",
    "terms",
    "captions",
    "embedders",
    "mining",
    "round_trip",
    "endpoint",
    "remote",
    "chat",
    "synthesis_prompts",
    "synthesis",
    "answers",
    "asking",
    "stages",
    "baseline",
    "bootstrap",
    "bm25",
    "evaluation",
    "evaluation_report",
    "long_documents",
    "mteb_adapter",
    "convert",
    "decontamination",
    "validation_sets",
    "plot",
    "ablation",
    "commands",
]
VERIFY = [
    "outcome",
    "authors_models",
    "parts",
    "subject",
    "authors",
    "referee",
    "structure",
    "precisions",
    "command",
    "report",
    "conduct",
    "plan",
    "gpu_check",
    "bench",
    "child",
    "machine",
    "parity",
    "primitives",
    "speed",
    "profile",
    "kernels",
    "faults",
]


def layers() -> dict[str, list[str]]:
    """Package -> the dotted names of its modules, lowest first."""
    server = [
        f"server.{wing}.{name}" if wing else f"server.{name}"
        for wing, names in SERVER.items()
        for name in names
    ]
    return {
        "model": [f"model.{name}" for name in MODEL],
        "model.training": [f"model.training.{name}" for name in TRAINING],
        "model.verify": [f"model.verify.{name}" for name in VERIFY],
        "server": server,
    }


def wing_of(module: str) -> str:
    """The wing of a module of `server`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 else ""


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file of all modules in a package and the wings in it."""
    folder = ROOT / package.replace(".", "/")
    files = [*folder.glob("*.py"), *folder.glob("*/*.py")]
    tables = [other.replace(".", "/") for other in layers() if other.startswith(f"{package}.")]
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): file
        for file in files
        if file.stem != "__init__"
        and file.parent.relative_to(ROOT).as_posix() not in tables  # which have tables of their own
    }


def imports(path: Path) -> list[str]:
    """Absolute dotted names that a file imports, wherever in it (for `from a import b`: a.b)."""
    names = _imports_of(path.read_text(encoding="utf-8"))
    assert "" not in names, f"{path}: a relative import; write the whole name"
    return names


@cache
def _imports_of(code: str) -> list[str]:
    """A relative one is "". Kept: many tests read the same files."""
    names: list[str] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += ["" if node.level else f"{node.module}.{a.name}" for a in node.names]
    return names


def uses(path: Path, known: list[str]) -> set[str]:
    """Those of the known modules that a file imports."""
    return {
        name
        for imported in imports(path)
        for name in known
        if imported == name or imported.startswith(f"{name}.")
    }
