"""Access to a server: Triton's restriction flags, the saved keys, and secrets that `ps` does not show."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clip_tools import cli
from clip_tools.errors import ToolError
from clip_tools.measuring import perf
from clip_tools.measuring.options import PerfOptions
from clip_tools.serving import key_files, secret_arguments
from clip_tools.serving.access import CLOSED, DESCRIPTIVE, OPEN, Access, Tls, exposure_warning
from clip_tools.serving.serve_options import ServeOptions
from clip_tools.serving.tritonserver import on_this_machine

KEY, API_KEY, HTTP_KEY = "an-admin-key-of-25-letters", "an-api-key-of-23-letters", "a-key-for-http-alone"


def test_every_part_of_tritons_protocols_is_either_open_or_closed(triton_parts):
    assert sorted((*OPEN, *DESCRIPTIVE, *CLOSED)) == sorted(triton_parts)


@pytest.fixture(scope="module")
def triton_parts() -> list[str]:
    """The parts that `tritonserver --help` lists as restrictable, the same for HTTP and gRPC."""
    done = subprocess.run(
        [Path(sys.executable).with_name("tritonserver"), "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    text = " ".join((done.stdout + done.stderr).split())
    lists = re.findall(r"Allowed (?:APIs|protocols): ((?:[a-z-]+, )+[a-z-]+)", text)
    assert len(lists) == 2
    assert lists[0] == lists[1]
    return lists[0].split(", ")


def test_a_server_without_an_admin_key_is_restricted_with_a_random_one():
    one, other = Access.from_environment({}), ServeOptions().access
    assert one.admin_key != other.admin_key
    assert len(one.admin_key) >= 32
    for access in (one, other):
        grpc, http = access.secret_flags(open_metadata=False).values()
        everything = ",".join((*DESCRIPTIVE, *CLOSED))
        assert grpc == f"--grpc-restricted-protocol={everything}:clip-admin-key={access.admin_key}"
        assert http == f"--http-restricted-api={everything}:clip-admin-key={access.admin_key}"


@pytest.mark.parametrize(
    ("host", "open_metadata", "is_open"),
    [
        ("127.0.0.1", None, True),
        ("::1", None, True),
        ("0.0.0.0", None, False),  # noqa: S104
        ("192.0.2.1", None, False),
        ("192.0.2.1", True, True),
        ("127.0.0.1", False, False),
    ],
)
def test_metadata_is_open_only_on_a_loopback_host_unless_open_metadata_is_set(host, open_metadata, is_open):
    flags = ServeOptions(host=host, open_metadata=open_metadata).secret_flags
    assert len(flags) == 2
    for flag in flags:
        closed = flag.partition("=")[2].partition(":")[0].split(",")
        assert set(closed) == {*CLOSED, *(() if is_open else DESCRIPTIVE)}


def test_keys_come_from_the_environment_and_are_not_in_reprs_or_visible_flags():
    access = Access.from_environment({"CLIP_ADMIN_KEY": KEY, "CLIP_API_KEY": API_KEY})
    assert access.http_headers() == {"clip-admin-key": KEY, "clip-api-key": API_KEY}
    assert access.grpc_headers()["triton-grpc-protocol-clip-api-key"] == API_KEY
    assert (
        "--grpc-restricted-protocol=inference,model-config:clip-api-key=" + API_KEY
        in access.secret_flags(open_metadata=False).values()
    )
    shown = f"{access!r} {ServeOptions(access=access)!r} {[*access.secret_flags(open_metadata=False)]} {access.flags()}"
    assert KEY not in shown
    assert API_KEY not in shown


def test_clip_http_key_replaces_the_api_key_on_http_only():
    only = Access.from_environment({"CLIP_HTTP_KEY": HTTP_KEY})
    (flag,) = [flag for flag in only.secret_flags(open_metadata=False).values() if "inference" in flag]
    assert flag == f"--http-restricted-api=inference,model-config:clip-api-key={HTTP_KEY}"
    both = Access.from_environment({"CLIP_HTTP_KEY": HTTP_KEY, "CLIP_API_KEY": API_KEY})
    assert [flag.partition("clip-api-key=")[2] for flag in both.secret_flags(open_metadata=False).values()][2:] == [
        API_KEY,
        HTTP_KEY,
    ]
    assert both.http_headers()["clip-api-key"] == HTTP_KEY
    assert both.grpc_headers()["triton-grpc-protocol-clip-api-key"] == API_KEY
    assert HTTP_KEY not in f"{both!r} {[*both.secret_flags(open_metadata=False)]}"


@pytest.mark.parametrize("key", ["short", "with space and more letters", "sixteen,letters=:", "schlüssel-schlüssel"])
@pytest.mark.parametrize("variable", ["CLIP_ADMIN_KEY", "CLIP_API_KEY", "CLIP_HTTP_KEY"])
def test_a_short_or_malformed_key_exits_2_and_is_not_shown(variable, key):
    with pytest.raises(ToolError, match=f"{variable}: expected 16 or more letters.*openssl rand") as caught:
        Access.from_environment({variable: key})
    assert caught.value.exit_code == 2
    assert key not in str(caught.value)


def test_keys_are_kept_for_this_user_alone_while_the_server_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(key_files.tempfile, "gettempdir", lambda: str(tmp_path))
    access = Access(KEY, API_KEY, HTTP_KEY)
    key_files.save_keys("grpc://127.0.0.1:8001", access)
    (file,) = key_files.key_folder().iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    for url in ("grpc://localhost:8001", "localhost:8001", "grpcs://[::1]:8001", "http://127.0.0.1:8001"):
        assert key_files.access_of(url, {"CLIP_ADMIN_KEY": "a-key-of-some-other-server"}) == access
    for url in ("grpc://example.org:8001", "grpc://localhost:8002"):
        assert key_files.access_of(url, {}) is None
        assert key_files.access_of(url, {"CLIP_ADMIN_KEY": KEY}) == Access(KEY)
    key_files.remove_keys("grpc://localhost:8001", Access())  # another server's keys: the file stays
    assert key_files.access_of("grpc://localhost:8001", {}) == access
    key_files.remove_keys("grpc://localhost:8001", access)
    assert not file.exists()


def test_keys_of_a_server_that_was_killed_are_not_used(monkeypatch, tmp_path):
    monkeypatch.setattr(key_files.tempfile, "gettempdir", lambda: str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    with monkeypatch.context() as patch:
        patch.setattr(key_files.os, "getpid", lambda: ended.pid)
        key_files.save_keys("grpc://localhost:8001", Access(KEY))
    assert key_files.access_of("grpc://localhost:8001", {}) is None
    key_files.save_keys("grpc://localhost:8002", Access(API_KEY))
    assert [file.name for file in key_files.key_folder().iterdir()] == ["localhost-8002"]


@pytest.mark.parametrize("mode", [0o755, 0o770])
def test_no_key_is_written_where_others_could_read_it(monkeypatch, tmp_path, mode):
    monkeypatch.setattr(key_files.tempfile, "gettempdir", lambda: str(tmp_path))
    key_files.key_folder().mkdir()
    key_files.key_folder().chmod(mode)
    with pytest.raises(ToolError, match="expected a folder that you own"):
        key_files.save_keys("grpc://localhost:8001", Access(KEY))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    key_files.key_folder().rmdir()
    key_files.key_folder().symlink_to(elsewhere)
    with pytest.raises(ToolError, match="expected a folder that you own"):
        key_files.save_keys("grpc://localhost:8001", Access(KEY))
    assert not list(elsewhere.iterdir())


SHOW = (
    "import os, sys; print(*sys.argv[1:]); print(open('/proc/self/cmdline').read().replace(chr(0), ' ')); "
    "print(os.getppid())"
)


def test_a_program_gets_its_secrets_and_ps_shows_placeholders():
    """The command line has only placeholders, from before the program's first instruction."""
    with secret_arguments.popen_with_secrets(
        [sys.executable, "-c", SHOW, "plain"],
        {"--key=***": f"--key={KEY}", "--other=***": "--other=ünd more"},
        env=os.environ,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        arguments, command_line, parent = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    assert arguments == f"plain --key={KEY} --other=ünd more"
    assert command_line.strip().endswith("plain --key=*** --other=***")
    assert int(parent) == os.getpid()


def test_a_script_gets_its_secrets_as_well(tmp_path):
    """The kernel puts the interpreter before the script, so the command line has one argument more."""
    script = tmp_path / "script"
    script.write_text('#!/bin/sh\necho "$@"\ntr "\\0" " " < /proc/$$/cmdline\n')
    script.chmod(0o755)
    with secret_arguments.popen_with_secrets(
        [str(script), "plain"], {"--key=***": f"--key={KEY}"}, env=os.environ, stdout=subprocess.PIPE, text=True
    ) as process:
        arguments, command_line = process.communicate(timeout=60)[0].splitlines()
    assert arguments == f"plain --key={KEY}"
    assert command_line.split() == ["/bin/sh", str(script), "plain", "--key=***"]


def test_a_program_runs_with_a_warning_when_tracing_is_forbidden(monkeypatch, capsys):
    monkeypatch.setattr(secret_arguments, "_ptrace", lambda *_: -1)
    with secret_arguments.popen_with_secrets(
        ["echo"], {"***": KEY}, env=os.environ, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.communicate(timeout=60)[0] == f"{KEY}\n"
    assert "echo: `ps` shows its keys on this machine" in capsys.readouterr().err


def test_a_missing_program_raises_file_not_found_error():
    with pytest.raises(FileNotFoundError):
        secret_arguments.popen_with_secrets(["/nowhere"], {"***": KEY}, env=os.environ)


def test_a_server_with_tls_serves_plain_http_on_loopback_only(tmp_path):
    for name in ("cert", "key", "ca"):
        (tmp_path / name).touch()
    tls = Tls(tmp_path / "cert", tmp_path / "key", tmp_path / "ca")
    options = ServeOptions(host="0.0.0.0", access=Access(tls=tls))  # noqa: S104
    assert options.grpc_url == "grpcs://localhost:8001"
    assert options.http_host == "127.0.0.1"
    assert "--grpc-use-ssl-mutual=true" in tls.flags()
    assert ServeOptions(host="0.0.0.0").http_host == "0.0.0.0"  # noqa: S104
    with pytest.raises(ToolError, match="nowhere: expected a PEM file, found none"):
        Tls(tmp_path / "nowhere", tmp_path / "key").flags()


def test_a_tls_option_without_the_others_it_requires_is_a_usage_error():
    for half in (["--tls-cert=c"], ["--tls-key=k"], ["--tls-client-ca=a"]):
        done = CliRunner().invoke(cli.app, ["serve", *half])
        assert isinstance(done.exception, ToolError)
        assert "require each other" in str(done.exception)


def test_the_exposure_warning_is_only_for_a_server_that_anyone_can_use():
    ca = Access(tls=Tls(Path("c"), Path("k"), Path("a")))
    crash = "crafted HTTP request"
    assert "0.0.0.0" in exposure_warning("0.0.0.0", Access())  # noqa: S104
    assert crash in exposure_warning("192.0.2.1", Access())
    assert crash not in exposure_warning("192.0.2.1", Access(tls=Tls(Path("c"), Path("k"))))
    assert crash not in exposure_warning("192.0.2.1", Access(http_key=API_KEY))
    for host, access in (("127.0.0.1", Access()), ("192.0.2.1", Access(KEY, API_KEY)), ("192.0.2.1", ca)):
        assert exposure_warning(host, access) is None


def test_perf_analyzer_gets_the_keys_of_the_server_that_it_measures(monkeypatch, tmp_path):
    monkeypatch.setattr(key_files.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("CLIP_ADMIN_KEY", raising=False)
    assert perf.headers(PerfOptions(url="localhost:8001")) == {}
    key_files.save_keys("grpc://localhost:8001", Access(KEY))
    key_files.save_keys("http://localhost:8000", Access(KEY, API_KEY))
    grpc, http = PerfOptions(url="localhost:8001"), PerfOptions(url="localhost:8000", protocol="http")
    name = "triton-grpc-protocol-clip-admin-key"
    assert perf.headers(grpc) == {f"-H{name}:***": f"-H{name}:{KEY}"}
    assert [*perf.headers(http).values()] == [f"-Hclip-admin-key:{KEY}", f"-Hclip-api-key:{API_KEY}"]
    assert not any(KEY in shown or API_KEY in shown for shown in perf.headers(http))


def test_a_bare_tritonserver_listens_on_loopback_unless_an_address_is_given():
    loopback = [f"--{protocol}-address=127.0.0.1" for protocol in ("http", "grpc", "metrics")]
    assert on_this_machine([]) == loopback
    for given in (["--http-address=0.0.0.0"], ["--http-address", "0.0.0.0"]):  # noqa: S104
        assert on_this_machine(given) == [*given, *loopback[1:]]
