"""Keys and tokens of a real server: who is told, and who is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.processes import serving

pytestmark = pytest.mark.process

FAKE = ("--runner", "tests.server.runners:Hashing")


def test_a_worker_has_no_secret_in_its_environment(golden_checkpoint: Path, tmp_path: Path) -> None:
    key, token = "a-key-that-nobody-guesses", "hf_a_token"
    (tmp_path / "keys").write_text("# the other client's\nanother-key-of-a-client\n")
    (tmp_path / "keys").chmod(0o640)
    environment = {"NV_EMBED_API_KEY": key, "HF_TOKEN": token, "NV_EMBED_LOG_LEVEL": "debug"}
    options = (*FAKE, "--api-key-file", str(tmp_path / "keys"))
    with serving(golden_checkpoint, *options, log=tmp_path / "log", env=environment) as server:
        for pid in server.worker_pids():
            given = Path(f"/proc/{pid}/environ").read_bytes().decode()
            assert "NV_EMBED_LOG_LEVEL=debug" in given  # what is no secret is handed on
            assert key not in given
            assert token not in given
        assert server.worker_pids()
        for good in (key, "another-key-of-a-client"):
            server.client.headers["Authorization"] = f"Bearer {good}"
            assert server.embed(input="a very secret sentence").status_code == 200
        for bad in ("# the other client's", "# the other client's\nanother-key-of-a-client", "the"):
            server.client.headers["Authorization"] = f"Bearer {bad.splitlines()[0]}"
            assert server.embed(input="x").status_code == 401
        assert server.says("--api-key-file: "), server.log
        assert server.says("is open to others (mode 0640); chmod 600 closes it"), server.log
        assert server.says("clients name the model golden-embed"), server.log
        for secret in (key, "another-key-of-a-client", "very secret"):
            assert secret not in server.log
