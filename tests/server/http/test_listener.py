"""Where a server listens, and what is said where it cannot."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from server.errors import SettingsError
from server.http.listener import listen, unlink_socket
from server.settings import Settings


@pytest.mark.parametrize("kind", ["file", "folder", "pipe"])
def test_what_is_no_socket_stays(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "socket"
    {"file": path.touch, "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[kind]()
    with pytest.raises(SettingsError, match="there is something else that is no socket"):
        listen(Settings(uds=str(path)))
    unlink_socket(str(path))
    assert path.exists()


def test_what_an_earlier_server_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    listener, address = listen(Settings(uds=str(path)))
    with listener:
        assert address == f"unix:{path}"
        with pytest.raises(SettingsError, match="Address already in use"):
            listen(Settings(uds=str(path)))
    unlink_socket(str(path))
    assert not path.exists()


def test_a_port_that_is_taken() -> None:
    first, address = listen(Settings(port=0))
    with first:
        port = int(address.rpartition(":")[2])
        with pytest.raises(SettingsError, match=f"cannot listen on 127.0.0.1:{port}: .*--port"):
            listen(Settings(port=port))
