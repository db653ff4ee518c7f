"""Starts a program with secret arguments that `ps` does not show, for programs that take secrets in no other way.

Every user can read a process's command line; only its owner and root can read its environment. So the command line gets
placeholders and the environment the real arguments. A traced process stops after exec, before its first instruction.
While it is stopped, the pointers in `argv` are moved from the placeholders to the real arguments. For 64-bit Linux.
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
# Fields of /proc/PID/stat, counted from 1 as in proc(5).
_START_STACK, _ENV_START, _ENV_END = 28, 50, 51


def popen_with_secrets(
    arguments: Sequence[str],
    secrets: Mapping[str, str],
    *,
    env: Mapping[str, str],
    preexec_fn: Callable[[], None] | None = None,
    **options: Any,
) -> "subprocess.Popen[str]":
    """Start the program with `arguments` and the values of `secrets`. `ps` shows the keys of that dict instead.

    Where tracing is forbidden, the program is started anyway, and a warning says that `ps` shows the secrets.
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
            _replace_arguments(process.pid, hidden)
        except BaseException:
            process.kill()
            process.wait()
            raise
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        sys.stderr.write(f"{Path(arguments[0]).name}: `ps` shows its keys on this machine ({error})\n")
        return subprocess.Popen([*arguments, *hidden], env=env, preexec_fn=preexec_fn, **options)  # noqa: PLW1509
    return process


def _replace_arguments(pid: int, hidden: Sequence[str]) -> None:
    """Point the last arguments of a stopped process at these, which are in its environment, and let it run."""
    _, status = os.waitpid(pid, 0)
    if not os.WIFSTOPPED(status):
        raise ValueError(f"the process did not stop at its start: status {status}")
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        stack, begin, end = (int(fields[number - 3]) for number in (_START_STACK, _ENV_START, _ENV_END))
        with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
            memory.seek(begin - 1)  # from the zero byte before the first variable, which ends the last argument
            environment = memory.read(end - begin + 1)
            memory.seek(stack)
            (count,) = struct.unpack("<Q", memory.read(8))  # a script has more: its interpreter comes first
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
