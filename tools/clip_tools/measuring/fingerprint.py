"""What a measurement depends on: the machine, the software and the moment."""

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from clip_tools.paths import ROOT

PACKAGES = (
    *("nvidia-pytriton", "tritonclient", "onnxruntime-openvino", "onnxruntime-gpu", "torch", "open_clip_torch"),
    *("numpy", "pillow", "fastapi", "uvicorn", "triton-model-analyzer"),
)


def fingerprint() -> dict[str, Any]:
    """This machine, now. Two results may be compared in absolute numbers only when the first four entries agree.

    `cores` are those that this process may use. `git_commit` ends in "+" when the tree held changes, and is None
    outside a checkout. `gpu` is None without one.
    """
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": ask_nvidia_smi("name,memory.total") or None,
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "packages": dict(filter(None, map(_version, PACKAGES))),
        "git_commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _command(sys.argv),
        "load_before": round(os.getloadavg()[0], 2),
    }


def ask_nvidia_smi(query: str) -> str:
    """nvidia-smi's answer to a query, one line for each GPU; "" without a GPU."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> tuple[str, str] | None:
    try:
        return package, importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _commit() -> str | None:
    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return None if done.returncode else done.stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    return head and head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def _command(argv: list[str]) -> str:
    """The command without paths of this machine, so that others can repeat it."""
    return " ".join([Path(argv[0]).name, *argv[1:]]).replace(f"{ROOT}/", "").replace(str(Path.home()), "~")
