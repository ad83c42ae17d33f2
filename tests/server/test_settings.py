"""Options: precedence, names, contradictions, secrets."""

from __future__ import annotations

import argparse
import codecs
from pathlib import Path
from typing import get_args

import pytest

from server import settings
from server.cli.flags import add_flags
from server.cli.serve import exposed_secrets
from server.configuration import is_number, load, load_as, service_links
from server.errors import SettingsError
from server.settings import EncodeSettings, ModelSettings, Settings


def parse(*arguments: str) -> dict:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return vars(parser.parse_args(arguments))


def keys_of(settings: Settings) -> list[bytes]:
    return [one.key for one in settings.api_keys()]


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
        (["--attention", "flash"], {}, "or sdpa, not 'flash'; did you mean flash-attn?"),
        (["--devices", "auto,cpu"], {}, "auto stands alone"),
        (["--devices", ""], {}, "--devices: a value is empty"),
        ([], {"NV_EMBED_API_KEY": ""}, "NV_EMBED_API_KEY: a value is empty"),
        ([], {"NV_EMBED_MODEL": ""}, "NV_EMBED_MODEL: a value is empty"),
        (["--tls-key", "x"], {}, "--tls-certificate and --tls-key go together"),
        (["--revision", "abc"], {}, "--revision needs --model"),
        (["--port", "70000"], {}, "--port: must be at most 65535, not '70000'"),
        ([], {"NV_EMBED_PORT": "x"}, "NV_EMBED_PORT: must be a whole number, not 'x'"),
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
        ("port: x", f"{file} (port): must be a whole number, not 'x'"),
        ("- port", "must hold options"),
        ("port: [", "o.yaml, line 1: "),
        ("port: 1\nport: 2", "o.yaml, line 2: port stands there twice"),
        ('{"port": 1, "port": 2}', "port stands there twice"),
    ):
        file.write_text(text)
        with pytest.raises(SettingsError) as caught:
            load({"config": str(file)}, {})
        assert message in str(caught.value)


def test_keys_come_from_everywhere_and_never_show(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("key-3\n\n key-4 \n")
    got = load(parse("--api-key", "key-1", "--api-key", "key-2", "--api-key-file", str(file)), {})
    assert keys_of(got) == [b"key-1", b"key-2", b"key-3", b"key-4"]
    assert keys_of(load({}, {"NV_EMBED_API_KEY": "key-1"})) == [b"key-1"]
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


VALUED = [name for name in Settings.model_fields if name not in settings.HIDDEN]


@pytest.mark.parametrize("name", VALUED)
def test_an_empty_value_is_refused_wherever_it_stands(name: str, tmp_path: Path) -> None:
    variable = f"NV_EMBED_{name.upper()}"
    for blank in ("", " ", "\n"):
        with pytest.raises(SettingsError, match=f"^{variable}: a value is empty"):
            load({}, {variable: blank})
        with pytest.raises(SettingsError, match=f"^--{name.replace('_', '-')}: a value is empty"):
            load({name: [blank] if name in ("api_key", "devices") else blank}, {})
    for blank in ("", "''", "[]", "~", "['']", "[~]", "{}"):
        (tmp_path / "o.yaml").write_text(f"{name}: {blank}\n")
        with pytest.raises(SettingsError, match=rf"o\.yaml \({name}\): a value is empty"):
            load({}, {"NV_EMBED_CONFIG": str(tmp_path / "o.yaml")})
        # Also where the command does not ask for it.
        with pytest.raises(SettingsError, match="a value is empty"):
            load_as(ModelSettings, {"config": str(tmp_path / "o.yaml")}, {})


def test_an_empty_name_of_the_file_is_refused() -> None:
    with pytest.raises(SettingsError, match="NV_EMBED_CONFIG: a value is empty"):
        load({}, {"NV_EMBED_CONFIG": ""})


def test_no_query_instruction_has_a_word() -> None:
    assert load({}, {"NV_EMBED_QUERY_INSTRUCTION": "none"}).query_instruction == ""


def test_every_command_reads_the_same_places(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("port: 1\nmodel: from-file\ndtype: float16\nthreads: 2\ntruncate: end\n")
    environment = {"NV_EMBED_DTYPE": "bfloat16", "NV_EMBED_API_KEY": "not-of-this-command"}
    got = load_as(EncodeSettings, {"config": str(file), "threads": "3"}, environment)
    assert (got.model, got.dtype, got.threads, got.truncate) == ("from-file", "bfloat16", 3, "end")
    assert "api_key" not in EncodeSettings.model_fields
    for wrong in ("NV_EMBED_DYTPE", "NV_EMBED_MODELS"):  # also for a command that has few options
        with pytest.raises(SettingsError, match=f"{wrong}; did you mean"):
            load_as(ModelSettings, {}, {wrong: "x"})


def test_a_command_for_one_device_does_not_choose_among_several() -> None:
    assert load_as(ModelSettings, {}, {"NV_EMBED_DEVICES": "cuda:1"}).one_device() == "cuda:1"
    with pytest.raises(SettingsError, match="set CUDA_VISIBLE_DEVICES=GPU-1a-2b and name cuda:0"):
        load_as(ModelSettings, {}, {"NV_EMBED_DEVICES": "cuda:GPU-1a-2b"}).one_device()
    with pytest.raises(SettingsError, match="runs on one device, and cuda:0, cuda:1 are named"):
        load_as(ModelSettings, {}, {"NV_EMBED_DEVICES": "cuda:0,cuda:1"}).one_device()


NUMBERS = [name for name in VALUED if is_number(Settings.model_fields[name])]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value", ["x", "-1", "nan", "inf", "-inf", "1e999", "9" * 30, "9" * 5000, "1,5", "0x10", "1 2"]
)
def test_numbers_are_numbers_within_bounds(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load({name: value}, {})
    message = str(caught.value)
    assert message.startswith(f"--{name.replace('_', '-')}: ")
    assert any(words in message for words in ("must be", "has too many digits")), message
    assert len(message) < 200


@pytest.mark.parametrize("text", ["port: yes", "threads: true", "header_timeout: on"])
def test_yes_is_no_number(tmp_path: Path, text: str) -> None:
    (tmp_path / "o.yaml").write_text(text)
    with pytest.raises(SettingsError, match="must be a number, not true"):
        load({"config": str(tmp_path / "o.yaml")}, {})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "a" * 64], "--host: is neither an address nor a host's name"),
        (["--host", "a..b"], "--host: is neither an address nor a host's name"),
        (["--uds", "/tmp/" + "x" * 200], "--uds: a socket's path has at most 107 bytes, this one"),
        (["--uds", "/" + "ü" * 60], "--uds: a socket's path has at most 107 bytes, this one 121"),
        (["--root-path", "api"], "--root-path: must begin with /"),
        (["--root-path", "/api/"], "--root-path: must begin with /"),
        (["--cors-origin", "app.example"], "--cors-origin: 'app.example' is no origin"),
        (["--cors-origin", "https://a.example/"], "'https://a.example/' is no origin"),
        (["--devices", "cuda:99999999999999999999"], "must be auto, cpu, cuda or cuda:N"),
        (["--model", "a\0b"], "--model: a value holds NUL"),
    ],
)
def test_values_that_nothing_could_use(flags: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(parse(*flags), {})
    assert message in str(caught.value)


def test_values_that_are_right() -> None:
    for host in ("::1", "0.0.0.0", "localhost", "büro.example"):
        assert load({"host": host}, {}).host == host
    assert load({"uds": "/" + "x" * 106}, {}).uds == "/" + "x" * 106
    origins = ["*", "null", "https://a.example", "http://localhost:3000", "app://obsidian.md"]
    assert load({"cors_origin": origins}, {}).cors_origin == origins


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (codecs.BOM_UTF8 + b"port: 5\r\n", None),
        ("port: 5".encode("utf-16"), "is UTF-16, not UTF-8"),
        (b"api_key: *a-secret-key", "line 1: found undefined alias"),
        (b"api_key: !a-secret-key x", "line 1: could not determine a constructor"),
        (b"[" * 1_000, "nested too deeply"),
        (b"port: 5\0", "cannot be read"),
    ],
)
def test_files_as_they_come(tmp_path: Path, content: bytes, message: str | None) -> None:
    (tmp_path / "o.yaml").write_bytes(content)
    if message is None:
        assert load({"config": str(tmp_path / "o.yaml")}, {}).port == 5
        return
    with pytest.raises(SettingsError) as caught:
        load({"config": str(tmp_path / "o.yaml")}, {})
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_keys_as_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    keys = "# production\r\nfirst-key-of-all\r\n\r\n  # the second's\r\n\tsecond-key-of-all \r\n"
    for content in (keys.encode(), codecs.BOM_UTF8 + keys.encode()):
        file.write_bytes(content)
        got = keys_of(load({"api_key_file": str(file)}, {}))
        assert got == [b"first-key-of-all", b"second-key-of-all"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# only\n# comments\n", "holds no key"),
        (b"good-key-number-one\nkey # a note\n", "line 2: a key has a space"),
        (b"schl\xc3\xbcssel\n", "line 1: a key has a space or a character that is not ASCII"),
        (b"\n\nkey-1,key-2\n", "line 3: a key has a comma"),
        (b"abc\n", "line 1: a key has fewer than 4 characters"),
        ("some-key".encode("utf-16"), "is UTF-16, not UTF-8"),
        (b"some\x00key\n", "line 1: a key has a space or a character"),
        (b"schl\xfcssel\n", "line 1: not UTF-8"),
        (b"a b:some-key\n", "line 1: what stands before the colon is the key's name"),
        (b":some-key\n", "line 1: what stands before the colon is the key's name"),
        (b"a:b\n", "line 1: a key has fewer than 4 characters"),
        (b"{}", "holds no key"),
        (b'{"a": "some-key"', "Expecting ',' delimiter"),
        (b'{"a": "some-key", "a": "other-key"}', "entry 1: a name is no name, or stands there"),
        (b'{"a": "some-key", "b c": "other-key"}', "entry 2: a name is no name"),
        (b'{"a": {"b": "some-key"}}', "entry 1: must be a key or a list of keys"),
        (b'{"a": []}', "entry 1: must be a key or a list of keys"),
        (b'{"a": ["some-key", "b"]}', "entry 1: a key has fewer than 4"),
        (b'{"a": 12345}', "entry 1: must be a key"),
        (b'{"a": ' + b"[" * 100_000, "is nested too deeply"),
    ],
)
def test_a_file_that_holds_no_good_keys(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(SettingsError, match=r"^--api-key-file: ") as caught:
        load({"api_key_file": str(tmp_path / "keys")}, {}).api_keys()
    assert message in str(caught.value)
    assert "ssel" not in str(caught.value)
    assert "some-key" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "search:key-of-search\nbulk:key:with:colons\nbulk:key-of-bulk-2\nkey-of-nobody\n",
        '{"search": "key-of-search", "bulk": ["key:with:colons", "key-of-bulk-2"]}',
    ],
)
def test_keys_have_names(tmp_path: Path, content: str) -> None:
    (tmp_path / "keys").write_text(content)
    got = load({"api_key_file": str(tmp_path / "keys")}, {"NV_EMBED_API_KEY": "env:key-of-env"})
    named = [("env", b"key-of-env"), ("search", b"key-of-search")]
    named += [("bulk", b"key:with:colons"), ("bulk", b"key-of-bulk-2")]
    named += [("", b"key-of-nobody")] * content.count("nobody")
    assert [(one.name, one.key) for one in got.api_keys()] == named
    assert "key-of" not in repr(got) + repr(got.api_keys())


def test_a_key_has_one_name() -> None:
    for keys in (["a:some-key", "b:some-key"], ["a:some-key", "some-key"]):
        with pytest.raises(SettingsError, match="one key has two names"):
            load({"api_key": keys}, {}).api_keys()


LINKS = {  # as a kubelet sets them beside the Services nv-embed and nv-embed-metrics
    "NV_EMBED_SERVICE_HOST": "10.0.0.1",
    "NV_EMBED_SERVICE_PORT": "8000",
    "NV_EMBED_SERVICE_PORT_HTTP": "8000",
    "NV_EMBED_PORT": "tcp://10.0.0.1:8000",
    "NV_EMBED_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "NV_EMBED_PORT_8000_TCP_PROTO": "tcp",
    "NV_EMBED_PORT_8000_TCP_PORT": "8000",
    "NV_EMBED_PORT_8000_TCP_ADDR": "10.0.0.1",
    "NV_EMBED_METRICS_SERVICE_HOST": "10.0.0.2",
    "NV_EMBED_METRICS_PORT": "tcp://10.0.0.2:9090",
}


def test_what_kubernetes_makes_of_a_service_s_name_is_no_option() -> None:
    assert load({}, {**LINKS, "NV_EMBED_HOST": "::1"}) == Settings(host="::1")
    assert sorted(service_links({**LINKS, "NV_EMBED_HOST": "::1"})) == sorted(LINKS)
    for name, value in (
        ("NV_EMBED_PORT", "10.0.0.1:8000"),
        ("NV_EMBED_PORT_8000", "1"),
        ("NV_EMBED_SERVICE", "10.0.0.1"),
    ):
        with pytest.raises(SettingsError, match=name):
            load({}, {name: value})


@pytest.mark.parametrize(
    "key", ["abc,d", "my secret key", "schlüssel", "d", "a\nb-longer", "a\tb-c"]
)
def test_a_key_is_one_key(key: str) -> None:
    for flags, environment in (({"api_key": [key]}, {}), ({}, {"NV_EMBED_API_KEY": key})):
        with pytest.raises(SettingsError, match=r"API_KEY: a key |--api-key: a key ") as caught:
            load(flags, environment)
        assert key not in str(caught.value).replace("a key has", "")


def test_secrets_that_lie_open_are_warned_of(tmp_path: Path) -> None:
    keys, config, tls = tmp_path / "keys", tmp_path / "o.yaml", tmp_path / "key.pem"
    keys.write_text("a-key-that-is-long-enough\n")
    config.write_text("api_key: another-key-that-is-long\n")
    tls.write_text("PEM")
    flags = {"api_key_file": str(keys), "tls_key": str(tls), "tls_certificate": str(tls)}
    got = load({**flags, "config": str(config)}, {})
    for file in (keys, config, tls):
        file.chmod(0o600)
    assert list(exposed_secrets(got, str(config))) == []
    keys.chmod(0o644)
    config.chmod(0o620)
    tls.chmod(0o640)
    warnings = list(exposed_secrets(got, str(config)))
    assert [warning.split(":")[0] for warning in warnings] == [
        "--api-key-file",
        "--tls-key",
        "--config",
    ]
    assert "(mode 0644); chmod 600" in warnings[0]
    config.write_text("port: 5\n")  # no secret
    assert len(list(exposed_secrets(load({"config": str(config)}, {}), str(config)))) == 0
    short = load({"api_key": ["short-key"]}, {})
    assert list(exposed_secrets(short, None)) == [
        "1 API key(s) have fewer than 16 characters and could be guessed"
    ]


def test_every_kernel_can_be_asked_for() -> None:
    """The front does not import torch, so the names stand in two places."""
    from model import fused
    from model.attention.kernels import KERNEL_NAMES

    choices = get_args(Settings.model_fields["attention"].annotation)
    assert set(choices) == {"auto", *KERNEL_NAMES}
    assert get_args(Settings.model_fields["fused_kernels"].annotation) == fused.NAMES


def test_help_names_every_option_but_the_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    shown = capsys.readouterr().out
    for name in Settings.model_fields:
        flag = "--" + name.replace("_", "-")
        assert (flag in shown) == (name not in settings.HIDDEN), flag
    assert "NV_EMBED_MAX_BATCH_TOKENS" in "".join(shown.split())


@pytest.mark.parametrize(
    "name", ["cuda:GPU-5d5ba0d6-d33d-2b2c", "cuda:MIG-c6d4f1ef-42e4", "cuda:MIG-GPU-5d5b-a0d6/7/0"]
)
def test_gpus_by_uuid(name: str) -> None:
    assert load(parse("--devices", f"cpu,{name}"), {}).devices == ["cpu", name]


@pytest.mark.parametrize("name", ["cuda:GPU-", "cuda:gpu-1", "cuda:MIG", "cuda:GPU-1 2", "GPU-1"])
def test_what_is_no_uuid(name: str) -> None:
    with pytest.raises(SettingsError, match="must be auto, cpu, cuda or cuda:N"):
        load(parse("--devices", name), {})


@pytest.mark.parametrize("name", ["served-model-name", "query-instruction", "root-path", "host"])
def test_what_no_answer_could_say_is_refused(name: str, tmp_path: Path) -> None:
    """Bytes that are not UTF-8, as Python hands them on: /v1/models would fail for ever."""
    option, bad = name.replace("-", "_"), "/x\udcff"
    config = tmp_path / "server.yaml"
    config.write_text(f'{name}: "/x\\ud83d"\n')
    for flags, environment in (
        ({option: bad}, {}),
        ({}, {f"NV_EMBED_{option.upper()}": bad}),
        ({"config": str(config)}, {}),
    ):
        with pytest.raises(SettingsError, match="a value is not UTF-8"):
            load(flags, environment)


def test_the_name_of_a_file_need_not_be_utf8() -> None:
    assert load({"model": "/x\udcff"}, {}).model == "/x\udcff"


def test_an_option_that_stands_twice_in_two_spellings(tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("max-input-tokens: 50\nmax_input_tokens: 60\n")
    with pytest.raises(SettingsError, match="max_input_tokens stands there twice"):
        load({"config": str(config)}, {})
