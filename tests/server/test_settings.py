"""Options: precedence, names, contradictions, secrets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import pytest

from server import settings
from server.errors import SettingsError
from server.settings import Settings, load


def parse(*arguments: str) -> dict:
    parser = argparse.ArgumentParser()
    settings.add_flags(parser)
    return vars(parser.parse_args(arguments))


def test_defaults() -> None:
    assert load({}, {"HOSTNAME": "somewhere", "PORT": "1"}) == Settings()


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("port: 1\nhost: from-file\nmax-batch-tokens: 64\n")
    got = load(
        parse("--port", "3", "--config", str(file)),
        {"NV_EMBED_PORT": "2", "NV_EMBED_HOST": "from-env"},
    )
    assert (got.port, got.host, got.max_batch_tokens) == (3, "from-env", 64)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("o.toml", 'port = 5\ndevices = ["cpu", "cpu"]'),
        ("o.json", '{"port": 5, "devices": ["cpu","cpu"]}'),
    ],
)
def test_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    got = load({}, {"NV_EMBED_CONFIG": str(tmp_path / name)})
    assert (got.port, got.devices) == (5, ["cpu", "cpu"])


@pytest.mark.parametrize(
    "flags", [["--devices", "cpu,cpu"], ["--device", "cpu", "--device", "cpu"]]
)
def test_lists(flags: list[str]) -> None:
    assert load(parse(*flags), {}).devices == ["cpu", "cpu"]
    assert load({}, {"NV_EMBED_DEVICES": "cpu, cpu"}).devices == ["cpu", "cpu"]


def test_booleans() -> None:
    assert load(parse("--no-access-log"), {}).access_log is False
    assert load({}, {"NV_EMBED_OFFLINE": "true"}).offline is True


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (["--max-queued-tokens", "299999"], {}, "--max-queued-tokens 299999 is less than"),
        (["--devices", "gpu"], {}, "--devices gpu: must be auto, cpu, cuda or cuda:N"),
        (["--attention", "flash"], {}, "--attention: Input should be 'auto', 'flash-attn'"),
        (["--devices", "auto,cpu"], {}, "auto stands alone"),
        (["--devices", ""], {}, "--devices: a value is empty"),
        ([], {"NV_EMBED_API_KEY": ""}, "NV_EMBED_API_KEY: a value is empty"),
        ([], {"NV_EMBED_MODEL": ""}, "NV_EMBED_MODEL: String should have at least 1 character"),
        (["--tls-key", "x"], {}, "--tls-certificate and --tls-key go together"),
        (["--revision", "abc"], {}, "--revision needs --model"),
        (["--port", "70000"], {}, "--port: Input should be less than or equal to 65535"),
        ([], {"NV_EMBED_PORT": "x"}, "NV_EMBED_PORT: Input should be a valid integer"),
        ([], {"NV_EMBED_PROT": "1"}, "NV_EMBED_PROT; did you mean NV_EMBED_PORT?"),
    ],
)
def test_mistakes_name_the_option(
    flags: list[str], environment: dict[str, str], message: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load(parse(*flags), environment)
    assert message in str(caught.value)


def test_mistakes_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "o.yaml"
    for text, message in (
        ("prot: 1", "unknown option 'prot'; did you mean port?"),
        ("port: x", f"{file} (port): Input should be a valid integer"),
        ("- port", "must hold options"),
        ("port: [", "o.yaml, line 1: "),
    ):
        file.write_text(text)
        with pytest.raises(SettingsError) as caught:
            load({"config": str(file)}, {})
        assert message in str(caught.value)


def test_keys_come_from_everywhere_and_never_show(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("key-3\n\n key-4 \n")
    got = load(parse("--api-key", "key-1", "--api-key", "key-2", "--api-key-file", str(file)), {})
    assert got.api_keys() == [b"key-1", b"key-2", b"key-3", b"key-4"]
    assert load({}, {"NV_EMBED_API_KEY": "key-1,key-2"}).api_keys() == [b"key-1", b"key-2"]
    assert "key-1" not in repr(got)
    assert "key-1" not in str(got.model_dump())
    bad = tmp_path / "bad.yaml"
    bad.write_text('api_key: "key-1\n')
    with pytest.raises(SettingsError) as caught:
        load({"config": str(bad)}, {})
    assert "key-1" not in str(caught.value)
    file.write_text("\n")
    with pytest.raises(SettingsError, match="holds no key"):
        got.api_keys()


def test_every_kernel_can_be_asked_for() -> None:
    """The front does not import torch, so the names stand in two places."""
    from model.attention import KERNEL_NAMES

    choices = get_args(Settings.model_fields["attention"].annotation)
    assert set(choices) == {"auto", *KERNEL_NAMES}


def test_help_names_every_option_but_the_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    shown = capsys.readouterr().out
    for name in Settings.model_fields:
        flag = "--" + name.replace("_", "-")
        assert (flag in shown) == (name not in settings.HIDDEN), flag
    assert "NV_EMBED_MAX_BATCH_TOKENS" in "".join(shown.split())
