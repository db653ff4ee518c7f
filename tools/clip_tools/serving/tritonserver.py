"""Runs the real `tritonserver` of the nvidia-pytriton wheel from this environment, with plain flags.

The wheel expects its own launcher. So this module sets the backend directory, the library path, the Python for the
models, and the preloaded library that ignores cancelled calls (`ignore_cancellation.c`).
"""

import hashlib
import importlib.metadata
import os
import shutil
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from clip_tools import c_libraries
from clip_tools.errors import ToolError, exits_with_reason
from clip_tools.paths import BACKENDS

_BACKEND_FLAG = "--backend-directory"


@dataclass(frozen=True)
class Installation:
    """A runnable server: its binary, environment variables and backend directory."""

    binary: Path
    environment: dict[str, str]
    backends: Path


def find_installation() -> Installation:
    """The server of this Python environment, its backend directory assembled. Raises ToolError if a part is missing."""
    package = package_dir()
    libraries = package.parent / "nvidia_pytriton.libs"
    _check_numpy()
    libpython = Path(sysconfig.get_config_var("LIBDIR") or "")
    soname = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so"
    if not any(libpython.glob(soname + "*")):
        raise ToolError(
            f"{soname} was expected in {libpython}: the server's Python models need it. Install the shared library of "
            f"this Python (Debian: libpython{sys.version_info.major}.{sys.version_info.minor})"
        )
    bin_dir = Path(sys.executable).parent
    environment = {
        # The stub takes its packages from the first python3 on PATH.
        "PATH": os.pathsep.join([str(bin_dir), os.environ.get("PATH", os.defpath)]),
        "VIRTUAL_ENV": sys.prefix,
        "LD_LIBRARY_PATH": os.pathsep.join(
            part for part in (str(libraries), str(libpython), os.environ.get("LD_LIBRARY_PATH", "")) if part
        ),
    }
    library = c_libraries.library_path(c_libraries.IGNORE_CANCELLATION)
    if library.is_file():
        environment["LD_PRELOAD"] = os.pathsep.join(filter(None, (str(library), os.environ.get("LD_PRELOAD"))))
    return Installation(
        binary=package / "tritonserver" / "bin" / "tritonserver",
        environment=environment,
        backends=assemble_backends(package / "tritonserver", BACKENDS),
    )


def package_dir() -> Path:
    """The folder of the wheel's package. Raises ToolError if it is not installed."""
    try:
        distribution = importlib.metadata.distribution("nvidia-pytriton")
    except importlib.metadata.PackageNotFoundError as error:
        raise ToolError(
            "no tritonserver: nvidia-pytriton is not installed: pip install 'clip-embed[server]'", exit_code=2
        ) from error
    return Path(str(distribution.locate_file("pytriton")))


def _check_numpy() -> None:
    version = importlib.metadata.version("numpy")
    if int(version.split(".", maxsplit=1)[0]) >= 2:
        raise ToolError(
            f"numpy {version} is installed, but the Python models of tritonserver 24.10 crash with numpy 2 at their "
            "first request: pip install 'numpy<2'"
        )


def assemble_backends(server: Path, ours: Path) -> Path:
    """A backend directory with Triton's Python backend and ours, in this environment.

    It has copies: Triton refuses a symlink that leaves the directory. Its name contains a digest of its files, so the
    files of a running server never change, and a second call reuses it.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise ToolError(f"tritonserver has no Python backend for Python {version}: use Python 3.11")
    sources = {"python/" + path.name: path for path in (server / "backends" / "python").iterdir() if path.is_file()}
    sources["python/triton_python_backend_stub"] = stub
    sources |= {str(path.relative_to(ours)): path for path in ours.glob("*/*.py")}
    digest = hashlib.sha256()
    for name, path in sorted(sources.items()):
        stat = path.stat()
        content = path.read_bytes() if path.suffix == ".py" else f"{stat.st_size} {stat.st_mtime_ns}".encode()
        digest.update(name.encode() + b"\0" + content)
    target = Path(sys.prefix) / "share" / "clip-tools" / f"backends-{digest.hexdigest()[:12]}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            for name, path in sources.items():
                copy = Path(folder) / "backends" / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy)
                copy.chmod(0o755)
            try:
                (Path(folder) / "backends").rename(target)
            except OSError:  # another process was first
                if not target.is_dir():
                    raise
    return target


def command(installation: Installation, arguments: list[str]) -> list[str]:
    """The server's command line, with our backends unless the arguments give others."""
    ours = (
        [] if any(a.split("=")[0] == _BACKEND_FLAG for a in arguments) else [f"{_BACKEND_FLAG}={installation.backends}"]
    )
    return [str(installation.binary), *ours, *arguments]


def on_this_machine(arguments: list[str]) -> list[str]:
    """The flags, with the loopback address for each protocol without one; Triton's default is all addresses."""
    given = {argument.partition("=")[0] for argument in arguments}
    addresses = [f"--{protocol}-address" for protocol in ("http", "grpc", "metrics")]
    return [*arguments, *(f"{flag}=127.0.0.1" for flag in addresses if flag not in given)]


def main() -> None:
    """The command `tritonserver`, for Model Analyzer and people: exec tritonserver with these flags.

    It has no keys, so by default it listens on this machine alone.
    """
    with exits_with_reason("tritonserver"):
        installation = find_installation()
    os.execve(  # noqa: S606
        installation.binary,
        command(installation, on_this_machine(sys.argv[1:])),
        {**os.environ, **installation.environment},
    )
