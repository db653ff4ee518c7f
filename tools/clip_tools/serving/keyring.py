"""The keys of the servers that this user runs on this machine, so that `clip-tools swap` and its like need no telling.

Each is a file that its owner alone can read, in a folder that only its owner can enter, under the system's temporary
one: on this machine, and gone with it.
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


def keyring_folder() -> Path:
    """This user's folder of keys."""
    return Path(tempfile.gettempdir()) / f"clip-tools-keys-{os.getuid()}"


def remember(url: str, access: Access) -> None:
    """Keep the keys of the server that is about to listen at this URL. Raises ToolError when they would not be safe."""
    folder = keyring_folder()
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not _is_ours_alone(folder):
        raise ToolError(
            f"{folder}: expected a folder that is yours and that nobody else can enter; remove it, or set TMPDIR"
        )
    for left in folder.iterdir():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # another's draft, or gone meanwhile
            if not _lives(json.loads(left.read_text())["pid"]):
                left.unlink()
    path = folder / _name(url)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
        keys = {"admin_key": access.admin_key, "api_key": access.api_key, "http_key": access.http_key}
        json.dump({"pid": os.getpid(), **keys}, file)
    draft.replace(path)


def forget(url: str, access: Access) -> None:
    """Remove what `remember` kept, unless another server has taken its place."""
    if (kept := _kept(url)) and kept.admin_key == access.admin_key:
        (keyring_folder() / _name(url)).unlink(missing_ok=True)


def access_of(url: str, environment: Mapping[str, str]) -> Access | None:
    """The keys of the server at a URL: of one that runs here those kept, else the environment's; None: no admin key."""
    if kept := _kept(url):
        return kept
    keys = keys_in(environment)
    return Access(**keys, tls=None) if "admin_key" in keys else None


def runs_here(url: str) -> bool:
    """Whether this user runs the server at a URL on this machine."""
    return _kept(url) is not None


def _kept(url: str) -> Access | None:
    """What `remember` kept, while the process that did lives."""
    folder = keyring_folder()
    try:
        kept = json.loads((folder / _name(url)).read_text()) if _is_ours_alone(folder) else {}
        if _lives(kept["pid"]):
            return Access(**{name: kept[name] for name in ("admin_key", "api_key", "http_key")})
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").is_dir()


def _is_ours_alone(folder: Path) -> bool:
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _name(url: str) -> str:
    """One name for all the names of this machine's loopback; a key is never sent to a server at another address."""
    parts = urlsplit(url if "://" in url else f"grpc://{url}")
    host = parts.hostname or ""
    if host == "::1" or host.startswith("127."):
        host = "localhost"
    return f"{host.replace(':', '_')}-{parts.port}"
