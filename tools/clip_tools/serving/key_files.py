"""Key files: the keys of the servers that this user runs on this machine, for `clip-tools swap` and others.

Each file is readable by its owner alone, in a folder that only its owner can enter, in the system's temporary folder.
"""

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from clip_tools.errors import ToolError
from clip_tools.serving.access import Access, keys_in


def key_folder() -> Path:
    """This user's folder of key files."""
    return Path(tempfile.gettempdir()) / f"clip-tools-keys-{os.getuid()}"


def save_keys(url: str, access: Access) -> None:
    """Save the keys of the server that will listen at this URL. Raises ToolError if others could read them."""
    folder = key_folder()
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not _is_ours_alone(folder):
        raise ToolError(f"{folder}: expected a folder that you own and nobody else can enter; remove it, or set TMPDIR")
    for file in folder.iterdir():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not complete yet, or just removed
            if not _is_running(json.loads(file.read_text())["pid"]):
                file.unlink()
    path = folder / _name(url)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as opened:
        keys = {"admin_key": access.admin_key, "api_key": access.api_key, "http_key": access.http_key}
        json.dump({"pid": os.getpid(), **keys}, opened)
    draft.replace(path)


def remove_keys(url: str, access: Access) -> None:
    """Remove the key file of this server, unless another server has replaced it."""
    if (saved := _saved(url)) and saved.admin_key == access.admin_key:
        (key_folder() / _name(url)).unlink(missing_ok=True)


def access_of(url: str, environment: Mapping[str, str]) -> Access | None:
    """The keys of the server at a URL: saved ones if it runs here, else the environment's. None: no admin key."""
    if saved := _saved(url):
        return saved
    keys = keys_in(environment)
    return Access(**keys, tls=None) if "admin_key" in keys else None


def runs_here(url: str) -> bool:
    """Whether this user runs the server at a URL on this machine."""
    return _saved(url) is not None


def _saved(url: str) -> Access | None:
    """The saved keys, if the process that saved them still runs."""
    folder = key_folder()
    try:
        saved = json.loads((folder / _name(url)).read_text()) if _is_ours_alone(folder) else {}
        if _is_running(saved["pid"]):
            return Access(**{name: saved[name] for name in ("admin_key", "api_key", "http_key")})
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").is_dir()


def _is_ours_alone(folder: Path) -> bool:
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _name(url: str) -> str:
    """One file name for all names of the loopback. A key is never sent to another address."""
    parts = urlsplit(url if "://" in url else f"grpc://{url}")
    host = parts.hostname or ""
    if host == "::1" or host.startswith("127."):
        host = "localhost"
    return f"{host.replace(':', '_')}-{parts.port}"
