"""A server that no longer embeds is ended, and the supervisor starts the next one."""

import os
import shutil
import signal as signals
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from clip_embed import DeadlineExceededError, ServerError, ServerOverloadedError
from clip_tools.errors import ToolError
from clip_tools.serving import probe as probes
from clip_tools.serving import process as processes
from clip_tools.serving import supervisor, watchdog
from clip_tools.serving.probe import ImageProbe
from clip_tools.serving.process import TritonProcess
from clip_tools.serving.supervisor import Supervisor
from clip_tools.serving.watchdog import Watchdog, decoding_cpu_s, stubs

LONG_S = 60.0


def a_process(script: str) -> TritonProcess:
    """A shell in place of tritonserver. Its flags become $0, $1 and so on."""
    return TritonProcess(["/bin/sh", "-c", script], {"PATH": "/usr/bin:/bin"})


def wait_for_a_line(process: TritonProcess) -> None:
    deadline = time.monotonic() + LONG_S
    while not process._tail:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def stub(tmp_path):
    """A child process with the name of Triton's stub for a Python model."""
    binary = tmp_path / "triton_python_backend_stub"
    shutil.copy(shutil.which("sleep"), binary)
    process = subprocess.Popen([binary, "600"])
    deadline = time.monotonic() + LONG_S
    while process.pid not in stubs(os.getpid()):  # the kernel may set the name after Popen has returned
        assert time.monotonic() < deadline
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize(("signal", "words"), [("SIGKILL", "has ended"), ("SIGSTOP", "is stopped")])
def test_a_stub_that_has_ended_or_is_stopped_is_named(stub, signal, words):
    os.kill(stub.pid, getattr(signals, signal))
    dog = Watchdog(os.getpid(), probe=lambda: None)
    found = dog.watch(lambda seconds: threading.Event().wait(seconds / 10))
    assert found is not None
    assert f"(process {stub.pid}) {words}" in found


def test_a_healthy_stub_is_left_alone_until_the_server_ends(stub):
    assert stubs(os.getpid()).keys() == {stub.pid}
    looks = iter([False, False, False, True])
    assert Watchdog(os.getpid(), probe=lambda: None).watch(lambda _: next(looks)) is None


def test_a_process_whose_name_is_not_utf8_is_skipped(tmp_path):
    """The kernel shows the names of all users' processes as raw bytes."""
    binary = os.fsencode(tmp_path) + b"/\xff\xfe"
    shutil.copy(shutil.which("sleep"), binary)
    process = subprocess.Popen([binary, "600"])
    try:
        assert stubs(os.getpid()) == {}
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("instance", "counts"), [("preprocess_0_1", True), ("clip_onnx_0_0", False)])
def test_only_the_cpu_time_of_preprocess_counts_as_decoding(tmp_path, instance, counts):
    binary = tmp_path / "triton_python_backend_stub"
    shutil.copy(shutil.which("sh"), binary)
    process = subprocess.Popen([binary, "-c", "while :; do :; done", instance, "last"])
    try:
        deadline = time.monotonic() + LONG_S
        while stubs(os.getpid())[process.pid].cpu_s < 0.05:
            assert time.monotonic() < deadline
        assert (decoding_cpu_s(os.getpid()) > 0) is counts
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("answers", "is_broken"), [(["no", "no"], True), (["no", None, "no", None], False)])
def test_two_failed_probes_in_a_row_mean_a_broken_server(monkeypatch, answers, is_broken):
    monkeypatch.setattr(watchdog, "PROBE_EVERY_S", 0.001)
    monkeypatch.setattr(watchdog, "PROBE_AGAIN_S", 0.001)
    left, asked = iter(answers), threading.Event()

    def probe():
        answer = next(left, None)
        if answer is None and len(answers) > 2:
            asked.set()
        return answer

    found = Watchdog(1 << 22, probe).watch(lambda _: asked.wait(0.01) and next(left, "over") == "over")
    assert found == ("a test image was not embedded: no" if is_broken else None)


def test_an_exception_in_a_probe_counts_as_a_failed_probe(monkeypatch):
    monkeypatch.setattr(watchdog, "PROBE_EVERY_S", 0.001)
    monkeypatch.setattr(watchdog, "PROBE_AGAIN_S", 0.001)

    def probe():
        raise ValueError("not foreseen")

    deadline = time.monotonic() + LONG_S
    found = Watchdog(1 << 22, probe).watch(lambda _: threading.Event().wait(0.01) or time.monotonic() > deadline)
    assert found == "a test image was not embedded: ValueError: not foreseen"


class Client:
    """Raises `error` from `embed`, if it has one."""

    def __init__(self, error=None):
        self.error = error

    def embed(self, _images):
        if self.error:
            raise self.error

    def __call__(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def metrics(path: Path, batches: int, decoded: int = 99) -> str:
    path.write_text(
        "# TYPE nv_inference_exec_count counter\n"
        f'nv_inference_exec_count{{model="preprocess",version="1"}} {decoded}\n'
        f'nv_inference_exec_count{{model="clip_onnx",version="1"}} {batches}\n'
    )
    return path.as_uri()


@pytest.fixture
def impatient(monkeypatch):
    """A full queue counts as stuck as soon as nothing was embedded since the last probe."""
    monkeypatch.setattr(probes, "STUCK_S", 0.0)


def test_a_server_with_a_full_queue_is_not_broken_during_one_long_batch(tmp_path):
    client = Client()
    probe = ImageProbe(client, b"image", metrics(tmp_path / "metrics", 7))
    client.error = ServerOverloadedError("full")
    assert [probe(), probe()] == [None, None]


@pytest.mark.usefixtures("impatient")
def test_a_stuck_engine_is_broken_even_while_images_are_decoded(tmp_path):
    client = Client(ServerOverloadedError("full"))
    probe = ImageProbe(client, b"image", metrics(tmp_path / "metrics", 7))
    metrics(tmp_path / "metrics", 7, decoded=500)
    assert "full" in probe()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("error", [ServerOverloadedError("full"), DeadlineExceededError("slow")])
def test_a_server_that_is_only_busy_is_not_broken(tmp_path, error):
    """A busy server embeds images of other clients meanwhile."""
    client = Client()
    probe = ImageProbe(client, b"image", metrics(tmp_path / "metrics", 7))
    assert probe() is None
    client.error = error
    metrics(tmp_path / "metrics", 8)
    assert probe() is None
    assert str(error) in probe()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("error", [ServerOverloadedError("full"), DeadlineExceededError("slow")])
def test_a_server_that_decodes_slow_images_is_not_broken(tmp_path, error):
    """All its images may take long. Then nothing is embedded, but its CPU time still grows."""
    cpu_s = [5.0]
    probe = ImageProbe(Client(error), b"image", metrics(tmp_path / "metrics", 7), lambda: cpu_s[0])
    cpu_s[0] += LONG_S
    assert probe() is None
    assert str(error) in probe()


def test_a_server_error_is_a_failure_even_on_a_busy_server(tmp_path):
    client = Client(ServerError("Stub process is not healthy"))
    probe = ImageProbe(client, b"image", metrics(tmp_path / "metrics", 7))
    metrics(tmp_path / "metrics", 8)
    assert probe() == "Stub process is not healthy"


def test_without_metrics_an_exceeded_deadline_is_a_failure(tmp_path):
    probe = ImageProbe(Client(DeadlineExceededError("slow")), b"image", (tmp_path / "none").as_uri())
    assert probe() == "slow"


@pytest.mark.usefixtures("impatient")
def test_without_metrics_a_full_queue_passes_unless_metrics_were_there_before(tmp_path):
    client = Client(ServerOverloadedError("full"))
    assert ImageProbe(client, b"image", (tmp_path / "none").as_uri())() is None
    probe = ImageProbe(client, b"image", metrics(tmp_path / "metrics", 7))
    (tmp_path / "metrics").unlink()
    assert "full" in probe()


class Server:
    """A server that embeds at once. With `failure` it cannot start; `broken` is what its watchdog reports."""

    def __init__(self, script="exec sleep 600", *, failure=None, broken=None, result=None):
        self.script, self.failure, self.broken, self.result = script, failure, broken, result
        self.stopped, self.is_ready = None, False

    def start(self):
        if self.failure:
            raise ToolError(self.failure)
        self.process = a_process(self.script)

    def wait_until_ready(self):
        self.process.raise_if_ended()
        self.is_ready = True
        return self.result

    def watchdog(self):
        return self

    def watch(self, has_ended):
        return self.broken if self.broken else has_ended(LONG_S) and None

    def terminate(self):
        self.process.terminate()

    def stop(self, *, is_broken):
        self.stopped = is_broken
        if not self.failure:
            self.process.stop(is_broken=is_broken)


def test_each_server_that_breaks_or_cannot_start_is_replaced(monkeypatch):
    """The wait is short after a server that embedded, and doubles after each one that did not."""
    monkeypatch.setattr(supervisor, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(supervisor, "LONGEST_WAIT_S", 0.04)
    servers = [
        Server(broken="its stub is gone", result="its vectors are right"),
        Server(failure="port taken"),
        Server(failure="still taken"),
        Server("exit 3"),
    ]
    servers += [Server(broken="again"), Server()]
    left, said = iter(servers), []

    def say(line):
        said.append(line)
        if len([one for one in said if "ready" in one]) == 3:
            keeper.stop()

    keeper = Supervisor(lambda: next(left), say, "it embeds")
    keeper.run()
    assert said[0] == "its vectors are right"
    assert "ready after" in said[1]
    reasons = [line.partition(";")[0] for line in said if "a new server" in line]
    assert reasons[:2] == ["its stub is gone", "port taken"]
    waits = [float(line.split()[-2]) for line in said if "a new server" in line]
    assert waits[:3] == [0.01, 0.02, 0.04]
    assert waits[-1] == 0.01
    assert [one.stopped for one in servers[:2]] == [True, True]
    assert next(one for one in reversed(servers) if one.stopped is not None).stopped is False


def test_the_supervisor_never_stops_trying(monkeypatch):
    monkeypatch.setattr(supervisor, "FIRST_WAIT_S", 1e-9)
    monkeypatch.setattr(supervisor, "LONGEST_WAIT_S", 1e-6)
    servers = [Server(broken="broken"), *(Server(failure="port taken") for _ in range(1100)), Server()]
    left, said = iter(servers), []

    def say(line):
        said.append(line)
        if len(said) > len(servers):
            keeper.stop()

    keeper = Supervisor(lambda: next(left), say, "it embeds")
    keeper.run()
    assert next(left, None) is None
    assert "it embeds" in said[-2]
    assert said[-1] == "the server was stopped"


def test_a_first_server_that_does_not_start_is_an_error():
    with pytest.raises(ToolError, match="port taken"):
        Supervisor(lambda: Server(failure="port taken"), print, "").run()


def test_a_stop_while_the_first_server_fails_is_no_error():
    """The server's error is not raised."""

    class Failing(Server):
        def stop(self, *, is_broken):
            keeper.stop()

        def terminate(self):
            pass

    keeper = Supervisor(lambda: Failing(failure="its vectors are wrong"), print, "")
    keeper.run()


def test_a_stop_ends_the_wait_for_the_next_server(monkeypatch):
    monkeypatch.setattr(supervisor, "FIRST_WAIT_S", LONG_S)
    began = time.monotonic()
    keeper = Supervisor(lambda: Server(broken="broken"), lambda line: "new" in line and keeper.stop(), "")
    keeper.run()
    assert time.monotonic() - began < LONG_S / 2


def test_a_broken_server_is_killed_when_it_has_drained():
    """Its log says that its models have stopped. Nothing waits until it has unloaded them."""
    process = a_process("trap 'echo All models are stopped; sleep 600' TERM; echo up; while :; do sleep 0.05; done")
    wait_for_a_line(process)
    began = time.monotonic()
    process.stop(is_broken=True)
    assert time.monotonic() - began < 4
    assert process.why_it_ended() is None


def test_a_server_that_does_not_unload_its_models_is_killed(monkeypatch):
    """Triton 24.10 does not unload after a model failed to reload, or while a Python model hangs in a driver."""
    monkeypatch.setattr(processes, "UNLOAD_S", 0.1)
    process = a_process("trap 'echo All models are stopped' TERM; echo up; while :; do sleep 0.05; done")
    wait_for_a_line(process)
    began = time.monotonic()
    process.stop()
    assert time.monotonic() - began < LONG_S / 4


def test_a_server_that_ignores_sigterm_is_killed_after_its_limit():
    """Even while nothing waits in `stop`, for example during the first image."""
    process = a_process("trap '' TERM; echo up; while :; do sleep 0.05; done")
    wait_for_a_line(process)
    process.terminate(limit_s=0.1)
    assert process.wait(LONG_S)
    process.stop()


DIES = """
import os, sys, threading
from clip_tools.serving.process import TritonProcess, _dying_with_parent

def start():
    global process  # its models' processes do not look for their server by themselves
    process = TritonProcess(["/bin/sh", "-c", "trap '' TERM; sleep 600 & echo $!; wait"], {"PATH": "/usr/bin:/bin"})

thread = threading.Thread(target=start)
thread.start()
thread.join()
while str(thread.native_id) in os.listdir("/proc/self/task"):
    pass
assert not process.wait(0.1)
open(f"/dev/shm/{process._shm_prefix}region", "w").close()
print(process.pid, process._shm_prefix, flush=True)
sys.stdin.read()
"""


def test_killing_this_process_kills_the_server_and_its_children_and_frees_their_shared_memory():
    """The server survives the end of the thread that started it, which Linux treats as its parent."""
    command = [sys.executable, "-c", DIES]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as parent:
        server, prefix = parent.stdout.readline().split()
        child = parent.stderr.readline()  # the server's log
        group = [psutil.Process(int(pid)) for pid in (server, child)]
        parent.kill()
        assert psutil.wait_procs(group, timeout=LONG_S)[1] == []
    deadline = time.monotonic() + LONG_S
    while list(Path("/dev/shm").glob(prefix + "*")):  # noqa: S108
        assert time.monotonic() < deadline


def test_a_child_exits_if_its_parent_ended_before_the_death_signal_was_set():
    code = """
import os, sys
from clip_tools.serving.process import _dying_with_parent
ask = _dying_with_parent()
def code_of(work):
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(work() or 0)
sys.exit(10 * code_of(ask) + code_of(lambda: code_of(ask)))  # its own child; a grandchild, whose parent is another
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 1


def test_the_end_of_a_server_is_seen_at_once_while_its_stubs_live_on():
    """Stubs keep the server's log open, and a stub that hangs would do so forever."""
    process = a_process("sleep 600 & kill -s SEGV $$")
    assert process.wait(LONG_S)
    began = time.monotonic()
    assert "by SIGSEGV: clients that cancel" in process.why_it_ended()
    process.stop(is_broken=True)
    assert time.monotonic() - began < 4
