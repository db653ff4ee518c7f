"""Start a program with arguments that `ps` does not show, for one that takes a secret in no other way.

Everybody on a machine may read every process's command line, but its environment only its owner and root. So the secret
arguments go into the environment, the command line gets stand-ins, and before the program's first instruction the
pointers to the stand-ins are turned to the real ones: while it stands still under ptrace, as after every exec of a
traced process. Nothing secret is in the command line at any time. For 64-bit Linux.
"""

import contextlib
import ctypes
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_TRACE_ME, _DETACH = 0, 17  # <sys/ptrace.h>
_VARIABLE = "CLIP_TOOLS_ARGUMENT_"
# Fields of /proc/PID/stat, counted from 1 as in proc(5): where the stack began and where the environment lies.
_START_STACK, _ENV_START, _ENV_END = 28, 50, 51


def popen(
    arguments: Sequence[str],
    secrets: Mapping[str, str],
    *,
    env: Mapping[str, str],
    preexec_fn: Callable[[], None] | None = None,
    **options: Any,
) -> "subprocess.Popen[str]":
    """`subprocess.Popen` of the arguments and, behind them, the values of `secrets`, of which `ps` shows the keys.

    Where tracing is forbidden the program is started all the same, and a line says that `ps` shows everything.
    """
    shown, hidden = [*arguments, *secrets], list(secrets.values())
    variables = {f"{_VARIABLE}{number}": argument for number, argument in enumerate(hidden)}

    def prepare() -> None:
        if preexec_fn is not None:
            preexec_fn()
        if _ptrace(_TRACE_ME, 0) == -1:
            raise PermissionError("ptrace")

    if not secrets:
        return subprocess.Popen(shown, env=env, preexec_fn=preexec_fn, **options)  # noqa: PLW1509
    try:
        process = subprocess.Popen(shown, env={**env, **variables}, preexec_fn=prepare, **options)  # noqa: PLW1509
        try:
            _turn_pointers(process.pid, hidden)
        except BaseException:
            process.kill()
            process.wait()
            raise
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        sys.stderr.write(f"{Path(arguments[0]).name}: its keys can be seen with `ps` on this machine ({error})\n")
        return subprocess.Popen([*arguments, *hidden], env=env, preexec_fn=preexec_fn, **options)  # noqa: PLW1509
    return process


def _turn_pointers(pid: int, hidden: Sequence[str]) -> None:
    """Let the last arguments be these, which are in the environment, and the stopped process go."""
    _, status = os.waitpid(pid, 0)
    if not os.WIFSTOPPED(status):
        raise ValueError(f"the process did not stop at its start: status {status}")
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        stack, begin, end = (int(fields[number - 3]) for number in (_START_STACK, _ENV_START, _ENV_END))
        with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
            memory.seek(begin - 1)  # each variable has a zero byte before it, the first one the last argument's
            environment = memory.read(end - begin + 1)
            memory.seek(stack)
            (count,) = struct.unpack("<Q", memory.read(8))  # more than we gave where a script's interpreter runs it
            for number, argument in enumerate(hidden):
                entry = f"{_VARIABLE}{number}={argument}".encode()
                offset = environment.index(b"\0" + entry + b"\0") + len(entry) - len(argument.encode())
                memory.seek(stack + 8 * (1 + count - len(hidden) + number))
                memory.write(struct.pack("<Q", begin + offset))
    finally:
        with contextlib.suppress(OSError):
            _ptrace(_DETACH, pid)


def _ptrace(request: int, pid: int) -> int:
    call = ctypes.CDLL(None, use_errno=True).ptrace
    call.restype = ctypes.c_long
    call.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    return int(call(request, pid, None, None))
