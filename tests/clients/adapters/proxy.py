"""LiteLLM's proxy, a process of its own in front of the server, asked by OpenAI's client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from tests.clients.adapters.ways import At, Ways

READY_S = 100
KEY = "sk-7f3a9c52e1d84b06a95f"
"""The proxy's own, which it wants to be long."""


@cache
def started(at: At) -> str:
    """Its URL. It goes with this process's group."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    names = [at.model, f"{at.model}-query", "no-such-model"]
    shared = {"api_base": at.v1, "api_key": at.key}
    models = [
        {"model_name": name, "litellm_params": {"model": f"openai/{name}", **shared}}
        for name in names
    ]
    folder = Path(tempfile.mkdtemp())
    (folder / "config.yaml").write_text(
        json.dumps({"model_list": models, "general_settings": {"master_key": KEY}})
    )
    program = Path(sys.executable).with_name("litellm")
    command = [sys.executable, str(program), "--config", str(folder / "config.yaml")]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=2, env=dict(os.environ))
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx.get(f"{url}/health/liveliness", timeout=5).raise_for_status()
        except httpx.HTTPError:
            time.sleep(0.5)
        else:
            return url
    raise RuntimeError("LiteLLM's proxy did not start")


def proxy(at: At) -> Ways:
    plain = At(at.url, at.key, at.model.removesuffix("-query"))
    if plain.model == "no-such-model":
        plain = At(at.url, at.key, "nv-embed-small")
    client = OpenAI(base_url=started(plain), api_key=KEY, max_retries=0)

    def ask(texts: list[str]) -> list[Any]:
        answer = client.embeddings.create(model=at.model, input=texts)
        return [row.embedding for row in answer.data]

    return Ways(ask)
