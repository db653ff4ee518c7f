"""What ends a server that no longer embeds, and what starts the next one."""

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
    """A shell in place of tritonserver; the flags that it gets are its $0 and so on."""
    return TritonProcess(["/bin/sh", "-c", script], {"PATH": "/usr/bin:/bin"})


def wait_for_a_line(process: TritonProcess) -> None:
    deadline = time.monotonic() + LONG_S
    while not process._tail:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def stub(tmp_path):
    """A child of this process that has a stub's name."""
    binary = tmp_path / "triton_python_backend_stub"
    shutil.copy(shutil.which("sleep"), binary)
    process = subprocess.Popen([binary, "600"])
    deadline = time.monotonic() + LONG_S
    while process.pid not in stubs(os.getpid()):  # a kernel gives it its name after Popen has returned
        assert time.monotonic() < deadline
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize(("signal", "words"), [("SIGKILL", "has ended"), ("SIGSTOP", "is stopped")])
def test_a_python_models_process_that_is_gone_or_stands_still_is_named(stub, signal, words):
    os.kill(stub.pid, getattr(signals, signal))
    dog = Watchdog(os.getpid(), probe=lambda: None)
    found = dog.watch(lambda seconds: threading.Event().wait(seconds / 10))
    assert found is not None
    assert f"(process {stub.pid}) {words}" in found


def test_a_well_one_is_left_alone_until_the_server_ends(stub):
    assert stubs(os.getpid()).keys() == {stub.pid}
    looks = iter([False, False, False, True])
    assert Watchdog(os.getpid(), probe=lambda: None).watch(lambda _: next(looks)) is None


def test_a_process_with_a_name_that_is_no_text_is_passed_over(tmp_path):
    """The kernel shows names as they are, of everyone's processes."""
    binary = os.fsencode(tmp_path) + b"/\xff\xfe"
    shutil.copy(shutil.which("sleep"), binary)
    process = subprocess.Popen([binary, "600"])
    try:
        assert stubs(os.getpid()) == {}
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("instance", "counts"), [("preprocess_0_1", True), ("clip_onnx_0_0", False)])
def test_the_cpu_time_of_preprocess_alone_is_a_sign_of_life(tmp_path, instance, counts):
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
def test_two_failed_probes_in_a_row_are_a_broken_server(monkeypatch, answers, is_broken):
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


def test_a_probe_that_fails_itself_is_one_that_failed(monkeypatch):
    monkeypatch.setattr(watchdog, "PROBE_EVERY_S", 0.001)
    monkeypatch.setattr(watchdog, "PROBE_AGAIN_S", 0.001)

    def probe():
        raise ValueError("not foreseen")

    deadline = time.monotonic() + LONG_S
    found = Watchdog(1 << 22, probe).watch(lambda _: threading.Event().wait(0.01) or time.monotonic() > deadline)
    assert found == "a test image was not embedded: ValueError: not foreseen"


class Client:
    """Fails as it is told to."""

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
    """A full queue counts as stuck when nothing was embedded since the last look."""
    monkeypatch.setattr(probes, "STUCK_S", 0.0)


def test_a_full_queue_is_not_broken_within_one_long_batch(tmp_path):
    client = Client()
    probe = ImageProbe(client, b"image", metrics(tmp_path / "metrics", 7))
    client.error = ServerOverloadedError("full")
    assert [probe(), probe()] == [None, None]


@pytest.mark.usefixtures("impatient")
def test_an_engine_that_is_stuck_is_broken_though_images_are_decoded(tmp_path):
    client = Client(ServerOverloadedError("full"))
    probe = ImageProbe(client, b"image", metrics(tmp_path / "metrics", 7))
    metrics(tmp_path / "metrics", 7, decoded=500)
    assert "full" in probe()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("error", [ServerOverloadedError("full"), DeadlineExceededError("slow")])
def test_a_server_that_is_only_busy_is_not_broken(tmp_path, error):
    """Busy is one that embeds for others meanwhile."""
    client = Client()
    probe = ImageProbe(client, b"image", metrics(tmp_path / "metrics", 7))
    assert probe() is None
    client.error = error
    metrics(tmp_path / "metrics", 8)
    assert probe() is None
    assert str(error) in probe()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("error", [ServerOverloadedError("full"), DeadlineExceededError("slow")])
def test_a_server_that_decodes_something_dear_is_not_broken(tmp_path, error):
    """Its images may all take long: nothing is embedded, but its CPU time goes on."""
    cpu_s = [5.0]
    probe = ImageProbe(Client(error), b"image", metrics(tmp_path / "metrics", 7), lambda: cpu_s[0])
    cpu_s[0] += LONG_S
    assert probe() is None
    assert str(error) in probe()


def test_an_error_of_the_server_is_one_however_busy_it_is(tmp_path):
    client = Client(ServerError("Stub process is not healthy"))
    probe = ImageProbe(client, b"image", metrics(tmp_path / "metrics", 7))
    metrics(tmp_path / "metrics", 8)
    assert probe() == "Stub process is not healthy"


def test_without_metrics_a_deadline_is_no_sign_of_life(tmp_path):
    probe = ImageProbe(Client(DeadlineExceededError("slow")), b"image", (tmp_path / "none").as_uri())
    assert probe() == "slow"


@pytest.mark.usefixtures("impatient")
def test_without_metrics_a_full_queue_is_one_but_not_where_there_were_some(tmp_path):
    client = Client(ServerOverloadedError("full"))
    assert ImageProbe(client, b"image", (tmp_path / "none").as_uri())() is None
    probe = ImageProbe(client, b"image", metrics(tmp_path / "metrics", 7))
    (tmp_path / "metrics").unlink()
    assert "full" in probe()


class Server:
    """One that embeds at once, until `life` seconds are over; or that cannot start."""

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


def test_each_server_that_breaks_or_cannot_start_has_a_successor(monkeypatch):
    """At once after one that embedded; the next one waits longer each time after those that did not."""
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


def test_it_is_tried_for_as_long_as_it_takes(monkeypatch):
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


def test_a_first_server_that_does_not_start_is_the_error():
    with pytest.raises(ToolError, match="port taken"):
        Supervisor(lambda: Server(failure="port taken"), print, "").run()


def test_a_stop_while_the_first_one_fails_is_a_stop():
    """And not the error for which another would be started."""

    class Failing(Server):
        def stop(self, *, is_broken):
            keeper.stop()

        def terminate(self):
            pass

    keeper = Supervisor(lambda: Failing(failure="its vectors are wrong"), print, "")
    keeper.run()


def test_a_stop_ends_the_wait_for_the_next_one(monkeypatch):
    monkeypatch.setattr(supervisor, "FIRST_WAIT_S", LONG_S)
    began = time.monotonic()
    keeper = Supervisor(lambda: Server(broken="broken"), lambda line: "new" in line and keeper.stop(), "")
    keeper.run()
    assert time.monotonic() - began < LONG_S / 2


def test_a_broken_server_is_killed_when_it_has_drained():
    """Its log says so; it is not waited for until it has unloaded."""
    process = a_process("trap 'echo All models are stopped; sleep 600' TERM; echo up; while :; do sleep 0.05; done")
    wait_for_a_line(process)
    began = time.monotonic()
    process.stop(is_broken=True)
    assert time.monotonic() - began < 4
    assert process.why_it_ended() is None


def test_one_that_does_not_unload_is_not_waited_for(monkeypatch):
    """As Triton 24.10 does not after a model that did not load anew, nor a Python model that hangs in a driver."""
    monkeypatch.setattr(processes, "UNLOAD_S", 0.1)
    process = a_process("trap 'echo All models are stopped' TERM; echo up; while :; do sleep 0.05; done")
    wait_for_a_line(process)
    began = time.monotonic()
    process.stop()
    assert time.monotonic() - began < LONG_S / 4


def test_one_that_does_not_answer_is_killed_after_its_limit():
    """Also while nobody waits in `stop`, as when it is told to end while it is being asked whether it embeds."""
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


def test_when_this_process_is_killed_the_server_and_its_children_are_too_and_nothing_is_left():
    """Not when the thread ends that started it, which is what Linux takes for the parent."""
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


def test_a_parent_that_has_ended_before_the_child_could_ask_is_noticed():
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


def test_the_end_of_one_whose_models_processes_live_on_is_seen_at_once():
    """They hold its log open, and one that hangs would do so for ever."""
    process = a_process("sleep 600 & kill -s SEGV $$")
    assert process.wait(LONG_S)
    began = time.monotonic()
    assert "by SIGSEGV: clients that cancel" in process.why_it_ended()
    process.stop(is_broken=True)
    assert time.monotonic() - began < 4
