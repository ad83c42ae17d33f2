"""Other embedding servers and libraries on the same texts and the same trunk, with equal threads.

Each is installed by its package name into an environment of its own below --scratch. They get the
trunk as a plain Mistral model with mean pooling (their work is less than ours: no latent-attention
pooler), float32 where not said otherwise. Those that serve are driven by the closed loop of
`tests.bench.serve`: single texts on 32 connections, 64 texts a request on 4. sentence-transformers
encodes the list offline, sorted by length, which no server can do. What cannot be installed or
does not run here is reported with its reason.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from model.platform import resources
from model.tokenizer import NVEmbedTokenizer
from tests.bench import report, serve, workloads
from tests.server.processes import free_ports

_OFFLINE = """
import json, sys, time, torch
from sentence_transformers import SentenceTransformer
folder, file, threads, backend = sys.argv[1:]
torch.set_num_threads(int(threads))
options = {}
if backend == "onnx":
    options = {"backend": "onnx", "model_kwargs": {"file_name": "onnx/model_quint8_avx2.onnx"}}
elif backend == "openvino":
    options = {"backend": "openvino", "model_kwargs": {"file_name": "openvino/model_qint8.xml"}}
model = SentenceTransformer(folder, device="cpu", **options)
texts = json.load(open(file))
model.encode(texts[:8])
started = time.perf_counter()
model.encode(texts, batch_size=32)
print(time.perf_counter() - started)
"""
_QUANTIZE = """
import sys
from sentence_transformers import SentenceTransformer
folder, backend = sys.argv[1:]
model = SentenceTransformer(folder, device="cpu", backend=backend)
if backend == "onnx":
    from sentence_transformers import export_dynamic_quantized_onnx_model as export
    export(model, "avx2", folder)
else:
    from sentence_transformers import export_static_quantized_openvino_model as export
    from optimum.intel import OVQuantizationConfig
    export(model, OVQuantizationConfig(), folder)
"""


@dataclass(frozen=True, slots=True)
class Peer:
    """packages: what pip is asked for; run: (environment, trunk, texts file, options) -> rows."""

    packages: tuple[str, ...]
    run: Callable[[Path, Path, Path, argparse.Namespace], list[dict[str, object]]]


def offline(backend: str) -> Callable[..., list[dict[str, object]]]:
    def run(
        environment: Path, trunk: Path, file: Path, options: argparse.Namespace
    ) -> list[dict[str, object]]:
        python = str(environment / "bin" / "python")
        if backend != "torch":
            _call([python, "-c", _QUANTIZE, str(trunk), backend], options)
        command = [python, "-c", _OFFLINE, str(trunk), str(file), str(options.threads), backend]
        seconds = float(_call(command, options).splitlines()[-1])
        count = len(json.loads(file.read_text()))
        return [{"load": "offline", "texts_per_s": count / seconds}]

    return run


def infinity(
    environment: Path, trunk: Path, file: Path, options: argparse.Namespace
) -> list[dict[str, object]]:
    (port,) = free_ports(1)
    command = [str(environment / "bin" / "infinity_emb"), "v2", "--model-id", str(trunk)]
    command += ["--engine", "torch", "--device", "cpu", "--port", str(port)]
    command += ["--no-bettertransformer", "--served-model-name", "trunk"]
    return _serve(command, port, "/embeddings", file, options)


def llama_cpp(kind: str) -> Callable[..., list[dict[str, object]]]:
    def run(
        environment: Path, trunk: Path, file: Path, options: argparse.Namespace
    ) -> list[dict[str, object]]:
        """llama.cpp's own server, built from the sources that the package
        brings; its slots share one context, each with room for the longest text. Its attention
        stays causal, which is half of the work."""
        source, build = _llama_cpp_built(environment, options)
        weights = trunk / f"trunk-{kind}.gguf"
        if not weights.exists():
            decoder = _as_decoder(trunk, trunk.with_name("trunk-decoder"))
            converter = [str(environment / "bin" / "python"), str(source / "convert_hf_to_gguf.py")]
            _call([*converter, str(decoder), "--outtype", kind, "--outfile", str(weights)], options)
        (port,) = free_ports(1)
        command = [str(build / "bin" / "llama-server"), "--model", str(weights), "--embedding"]
        command += ["--pooling", "mean", "--port", str(port)]
        command += ["--threads", str(options.threads), "--threads-batch", str(options.threads)]
        command += ["--parallel", "32", "--ctx-size", str(32 * 576)]
        command += ["--batch-size", "2048", "--ubatch-size", "2048", "--no-webui"]
        return _serve(command, port, "/v1/embeddings", file, options)

    return run


_GGML_FLAGS = {
    "avx512f": "-DGGML_AVX512=ON",
    "avx512_vnni": "-DGGML_AVX512_VNNI=ON",
    "avx512_bf16": "-DGGML_AVX512_BF16=ON",
    "avx512vbmi": "-DGGML_AVX512_VBMI=ON",
}


def _as_decoder(trunk: Path, folder: Path) -> Path:
    """The same weights as the language model that llama.cpp's converter knows."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(exist_ok=True)
    tensors = load_file(trunk / "model.safetensors")
    tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((trunk / "config.json").read_text())
    raw |= {"architectures": ["MistralForCausalLM"], "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(trunk / name, folder)
    return folder


def _llama_cpp_built(environment: Path, options: argparse.Namespace) -> tuple[Path, Path]:
    """-> (llama.cpp's sources, the folder that it was built in). Needs cmake and a C++ compiler."""
    package, build = environment / "source", environment / "build"
    if not (build / "bin" / "llama-server").exists():
        pip = [str(environment / "bin" / "pip"), "download", "--quiet", "--no-deps"]
        pip += ["--no-binary", ":all:", "--no-build-isolation", "--dest", str(package)]
        _call([*pip, "llama-cpp-python"], options)
        with tarfile.open(next(package.glob("*.tar.gz"))) as archive:
            archive.extractall(package, filter="data")
    (source,) = package.glob("*/vendor/llama.cpp")
    if not (build / "bin" / "llama-server").exists():
        without = ("CURL", "OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES")
        settings = [f"-DLLAMA_{name}=OFF" for name in without]
        # Not "native": that compiles in AMX, and the server ended with an illegal instruction.
        flags = set(Path("/proc/cpuinfo").read_text().split())
        here = [option for flag, option in _GGML_FLAGS.items() if flag in flags]
        settings += ["-DGGML_NATIVE=OFF", *here]
        configure = ["cmake", "-S", str(source), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
        _call([*configure, *settings], options)
        _call(["cmake", "--build", str(build), "--parallel", "--target", "llama-server"], options)
    return source, build


_LLAMA_CPP = ("torch", "gguf", "scikit-build-core", "transformers", "sentencepiece")
"""To unpack its sources and to convert the trunk for it."""
PEERS = {
    "sentence-transformers": Peer(("torch", "sentence-transformers"), offline("torch")),
    "sentence-transformers ONNX int8": Peer(
        ("torch", "sentence-transformers[onnx]"), offline("onnx")
    ),
    "sentence-transformers OpenVINO int8": Peer(
        ("torch", "sentence-transformers[openvino]"), offline("openvino")
    ),
    "infinity": Peer(("torch", "infinity-emb[torch,server]"), infinity),
    "llama.cpp f32": Peer(_LLAMA_CPP, llama_cpp("f32")),
    "llama.cpp q8_0": Peer(_LLAMA_CPP, llama_cpp("q8_0")),
}


def export_trunk(checkpoint: Path, folder: Path) -> Path:
    """The backbone as transformers' MistralModel, with mean pooling for sentence-transformers."""
    import torch
    from safetensors.torch import save_file

    from model.config import ModelConfig
    from model.weights.checkpoint import Checkpoint

    if (folder / "modules.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = ModelConfig.from_dir(checkpoint)
    source = Checkpoint(checkpoint)
    prefix = "embedding_model."
    tensors = {
        name.removeprefix(prefix): source.rows(name).to(torch.float32).clone()
        for name in source.shapes()
        if name.startswith(prefix)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((checkpoint / "config.json").read_text())["text_config"]
    raw |= {"architectures": ["MistralModel"], "model_type": "mistral", "sliding_window": None}
    raw |= {"torch_dtype": "float32", "head_dim": config.head_dim}
    (folder / "config.json").write_text(json.dumps(raw))
    shutil.copy(checkpoint / "tokenizer.json", folder)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
    ]
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 512}))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": config.hidden_size, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--peers", default=",".join(PEERS), help="a,b of: " + ", ".join(PEERS))
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--mix", default="lognormal", choices=workloads.MIXES)
    parser.add_argument("--threads", type=int, default=resources.usable_cores())
    parser.add_argument("--torch", default="torch==2.13.0", help="what torch is asked for as")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for each step of a peer")
    options = parser.parse_args(arguments)
    out = report.Report("peers", __doc__ or "", report.settings_of(options))
    out.start()
    checkpoint = workloads.checkpoint("trunk", options.scratch)
    trunk = export_trunk(checkpoint, (options.scratch / "trunk-mistral").resolve())
    texts = workloads.texts_of(NVEmbedTokenizer.from_dir(checkpoint), options.mix, options.texts)
    file = options.scratch.resolve() / "texts.json"
    file.write_text(json.dumps(texts))
    options.dtype, options.quantization = "float32", "none"
    seconds, _ = serve.forward_alone(checkpoint, file, options)
    bound = len(texts) / seconds
    out.add(system="nv-embed, packed forward", load="offline", texts_per_s=bound)
    for quantization in ("none", "int8-dynamic"):
        name = "nv-embed" if quantization == "none" else f"nv-embed {quantization}"
        for row in _ours(checkpoint, quantization, file, options):
            out.add(system=name, **row)
    for name in filter(None, options.peers.split(",")):
        peer = PEERS[name.strip()]
        try:
            environment = _install(peer, options)
            rows = peer.run(environment, trunk, file, options)
        except (RuntimeError, OSError, subprocess.SubprocessError, AssertionError) as error:
            reason = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1][:200]
            out.add(system=name, load="failed", why=reason)
            print(f"{name}: {reason}", flush=True)
            continue
        for row in rows:
            out.add(system=name, **row)
    ours = {row["load"]: row["texts_per_s"] for row in out.rows if row["system"] == "nv-embed"}
    ours["offline"] = bound
    for row in out.rows:
        if rate := row.get("texts_per_s"):
            name = f"nv-embed / {row['system']}, {row['load']}"
            out.ratios[name] = ours[row["load"]] / rate
    out.finish(options.results, group="system", label="load", value="texts_per_s", unit="texts/s")


def _ours(
    checkpoint: Path, quantization: str, file: Path, options: argparse.Namespace
) -> list[dict[str, object]]:
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "server.cli", "serve", "--model", str(checkpoint)]
    command += ["--served-model-name", "trunk", "--port", str(port), "--device", "cpu"]
    command += ["--dtype", "float32", "--quantization", quantization]
    command += ["--threads", str(options.threads)]
    return _serve(command, port, "/v1/embeddings", file, options)


def _install(peer: Peer, options: argparse.Namespace) -> Path:
    packages = [options.torch if name == "torch" else name for name in peer.packages]
    slug = peer.packages[1]
    environment = (
        options.scratch.resolve()
        / "peers"
        / "".join(letter if letter.isalnum() else "-" for letter in slug)
    )
    if not (environment / ".installed").exists():
        _call([sys.executable, "-m", "venv", str(environment)], options)
        pip = [str(environment / "bin" / "pip"), "install", "--quiet"]
        for package in packages:  # torch first, so that a peer takes the one that is there
            _call([*pip, package], options)
        (environment / ".installed").touch()
    return environment


def _environment(options: argparse.Namespace) -> dict[str, str]:
    threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, **threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _call(command: Sequence[str], options: argparse.Namespace) -> str:
    return subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        timeout=options.limit,
        env=_environment(options),
    ).stdout


def _serve(
    command: Sequence[str], port: int, path: str, file: Path, options: argparse.Namespace
) -> list[dict[str, object]]:
    texts = json.loads(file.read_text())
    process = subprocess.Popen(
        command,
        env=_environment(options),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, url, path, options.limit)
        rows: list[dict[str, object]] = []
        for name, size, connections in (("32 x 1 text", 1, 32), ("4 x 64 texts", 64, 4)):
            parts = [texts[i : i + size] for i in range(0, len(texts), size)]
            bodies = [serve.body_of(part, "trunk") for part in parts]
            seconds, _ = asyncio.run(serve.closed_loop(url, path, bodies, connections))
            rows.append({"load": name, "texts_per_s": len(texts) / seconds})
        return rows
    finally:
        process.terminate()
        process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, path: str, limit: float) -> None:
    deadline = time.monotonic() + limit
    body = serve.body_of(["ready?"], "trunk")
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"it ended with status {process.returncode} before it was ready")
        request = urllib.request.Request(  # noqa: S310
            url + path, data=body, headers={"content-type": "application/json"}
        )
        with suppress(OSError):
            urllib.request.urlopen(request, timeout=30).close()  # noqa: S310
            return
        time.sleep(0.5)
    raise RuntimeError("it did not become ready in time")


if __name__ == "__main__":
    main()
