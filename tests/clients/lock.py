"""`make lock-clients`: the newest releases that go together, as a list of all that is installed.

    python -m tests.clients.lock [sdks langchain …]

Nothing here may ask for torch. `borrowed` (which imports it) and `node` are renewed by hand: by
`pip install --dry-run --report` in .venv, and by `npm install` with new versions in package.json.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.clients.environments import HERE

WANTED = {
    "sdks": "openai cohere voyageai huggingface_hub ollama infinity-client tei-client "
    "baseten-performance-client requests aiohttp llm pydantic-ai-slim[openai] agno lancedb "
    "chromadb",
    "langchain": "langchain-openai langchain-nvidia-ai-endpoints langchain-community "
    "langchain-cohere langchain-voyageai langchain-ollama langchain-huggingface langchain-tests",
    "llama_index": "llama-index-embeddings-openai llama-index-embeddings-openai-like "
    "llama-index-embeddings-nvidia llama-index-embeddings-text-embeddings-inference "
    "llama-index-embeddings-cohere llama-index-embeddings-ollama "
    "llama-index-embeddings-azure-openai",
    "haystack": "haystack-ai nvidia-haystack cohere-haystack ollama-haystack",
    # Without the floor pip goes back to an older LiteLLM that suits the others' old releases.
    "litellm": "litellm>=1.110 langchain-litellm llama-index-embeddings-litellm dspy",
    "proxy": "litellm[proxy]",
    "agents": "semantic-kernel mem0ai graphiti-core",
}


def pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main(names: Sequence[str]) -> None:
    for name in names or WANTED:
        with tempfile.TemporaryDirectory() as folder:
            python = Path(folder) / "bin" / "python"
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
            without = Path(folder) / "without.txt"
            without.write_text("torch<0\n")
            there = ("--python", str(python))
            pip(*there, "install", "--quiet", "-c", str(without), *WANTED[name].split())
            pinned = pip(*there, "freeze", "--all", "--exclude", "pip")
        (HERE / f"requirements-{name}.txt").write_text(pinned)
        print(f"{name}: {len(pinned.splitlines())} packages", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
