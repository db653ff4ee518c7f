"""Runs `clip-embed` in the test's own process, which saves the second or two that a new process takes to import it."""

import os
import subprocess
import sys
from unittest import mock

from typer.testing import CliRunner

from clip_embed.cli import main

COMMAND = [sys.executable, "-W", "error", "-c", "from clip_embed.cli import main; main()"]
"""The command as a process, for what a process alone has: signals, a closed pipe, limits, missing packages."""


def run_here(
    *arguments: str | os.PathLike[str], stdin: bytes = b"", text: bool = False, **env: str
) -> subprocess.CompletedProcess:
    """The exit code, stdout and stderr of `clip-embed ARGUMENTS`; an exception that it lets through is the test's."""
    command = ["clip-embed", *map(str, arguments)]
    with CliRunner().isolation(stdin, env) as (stdout, stderr, _), mock.patch.object(sys, "argv", command):
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        sys.stdout.flush()
        sys.stderr.flush()
        out, err = stdout.getvalue(), stderr.getvalue()
    return subprocess.CompletedProcess(command, code, *((out.decode(), err.decode()) if text else (out, err)))
