"""`make audit`: the real pip-audit on pinned packages, with an advisory service on loopback."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from clip_tools import audit as module
from clip_tools.audit import audit
from clip_tools.errors import ToolError
from clip_tools.paths import ROOT

PINS = "".join(f"{name} \\\n    --hash=sha256:{'0' * 64}\n" for name in ("idna==3.6", "rich==14.0.0"))
VULNERABILITY = {
    "id": "PYSEC-0000-1",
    "summary": "a hole",
    "affected": [
        {
            "package": {"name": "idna", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "3.7"}]}],
        }
    ],
}


class Advisories(BaseHTTPRequestHandler):
    """An advisory service that knows one vulnerability, in idna 3.6."""

    status = 200

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = {"vulns": [VULNERABILITY]} if asked["package"]["name"] == "idna" and self.status == 200 else {}
        body = json.dumps(answer).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def options(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Advisories) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/v1/query"
        yield ["--vulnerability-service=osv", f"--osv-url={url}", f"--cache-dir={tmp_path / 'cache'}"]
        server.shutdown()
        thread.join()


@pytest.fixture
def requirements(tmp_path):
    path = tmp_path / "all.txt"
    path.write_text(PINS)
    return path


def test_a_known_vulnerability_is_reported_with_the_version_that_fixes_it(requirements, options):
    assert audit(requirements, options) == ["idna 3.6: PYSEC-0000-1, fixed in 3.7"]


def test_the_exit_code_is_0_for_a_clean_file_and_1_for_a_vulnerability(tmp_path, options, monkeypatch, capsys):
    folder = tmp_path / "requirements"
    folder.mkdir()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "FILES", ("all",))
    for pins, code, line in (
        (PINS.replace("idna==3.6", "certifi==2024.2.2"), 0, "all.txt: no known vulnerability\n"),
        (PINS, 1, "idna 3.6: PYSEC-0000-1, fixed in 3.7\n"),
    ):
        (folder / "all.txt").write_text(pins)
        with pytest.raises(SystemExit) as ended:
            module.main(options)
        assert ended.value.code == code
        assert capsys.readouterr().err == line


def test_the_audit_fails_when_the_advisory_service_does(requirements, options, monkeypatch):
    monkeypatch.setattr(Advisories, "status", 500)
    with pytest.raises(ToolError, match=r"all.txt could not be audited"):
        audit(requirements, options)
    gone = [options[0], "--osv-url=http://127.0.0.1:9/v1/query", options[2]]
    with pytest.raises(ToolError, match=r"all.txt could not be audited"):
        audit(requirements, gone)


def test_the_audit_fails_when_the_service_does_not_know_a_package(requirements, monkeypatch):
    """An index without advisories answers so, and pip-audit itself exits 0 then."""
    skipped = [{"name": "idna", "skip_reason": "Dependency not found"}, {"name": "rich", "version": "1", "vulns": []}]
    for packages, words in ((skipped, "the advisory service does not know 1 of 2 packages"), ([], "0 of 2 packages")):
        out = json.dumps({"dependencies": packages})
        monkeypatch.setattr(
            module.subprocess, "run", lambda *_, out=out, **__: module.subprocess.CompletedProcess([], 0, out, "")
        )
        with pytest.raises(ToolError, match=words):
            audit(requirements, [])


def test_every_requirements_file_is_audited():
    assert {path.stem for path in (ROOT / "requirements").glob("*.txt")} == set(module.FILES)
    for name in module.FILES:
        text = (ROOT / "requirements" / f"{name}.txt").read_text()
        assert len(re.findall(r"--hash=", text)) >= len(module._PIN.findall(text)) > 0
