"""`python -m clip_tools.kernel`: builds the library that resamples for `preprocess`, with the compiler of ziglang."""

import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from clip_tools.errors import ToolError
from clip_tools.paths import MODELS

SOURCE = MODELS / "preprocess" / "1" / "clip_resample.c"
# Any processor of the kind: what it has beyond that, the library finds out when it runs. glibc as in manylinux2014.
_PROCESSORS = ("x86_64", "aarch64")
_FLAGS = ("-O3", "-s", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")


def library(source: Path = SOURCE) -> Path:
    """Where `clip_resample.py` looks for the library of this very source."""
    return source.with_suffix(f".{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so")


def build(source: Path = SOURCE, compiler: Sequence[str] = (sys.executable, "-m", "ziglang", "cc")) -> Path:
    """The library of the source, built unless it is there; those of other sources go. Raises ToolError."""
    path = library(source)
    if path.is_file():
        return path
    if platform.machine() not in _PROCESSORS:
        raise ToolError(f"expected a processor of {', '.join(_PROCESSORS)}, came {platform.machine()}")
    target = ("-target", f"{platform.machine()}-linux-gnu.2.17", "-mcpu=baseline")
    built = path.with_name(f".{os.getpid()}.so")
    command = [*compiler, *target, *_FLAGS, str(source), "-o", str(built), "-lm"]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ToolError(f"{source.name} could not be compiled: {said[-1]}")
    for other in source.parent.glob(f"{source.stem}.*.so"):
        other.unlink()
    built.replace(path)
    return path


def main() -> int:
    """Build it; 1, and a line on stderr, where that fails."""
    try:
        build()
    except (ToolError, OSError) as error:
        sys.stderr.write(f"preprocess will resample with Pillow, which takes twice as long an image: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
