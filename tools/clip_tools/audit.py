"""`python -m clip_tools.audit`: checks the pinned packages for known vulnerabilities, by pip-audit.

pip-audit passes packages that the advisory service does not know; a mirror without advisories knows none. This audit
fails unless every package was looked up.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from clip_tools.errors import ToolError
from clip_tools.paths import ROOT

FILES = ("all", "client", "container", "container-export", "container-kernel", "gpu", "tensorrt", "uv")
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==", re.MULTILINE)


def audit(requirements: Path, options: Sequence[str]) -> list[str]:
    """A line for each vulnerability of a file's pins. Raises ToolError if a pin was not looked up."""
    pins = len(_PIN.findall(requirements.read_text()))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip_audit", "--requirement", str(requirements), "--require-hashes"),
            *("--disable-pip", "--format=json", "--progress-spinner=off", *options),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError) as error:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise ToolError(f"{requirements.name} could not be audited: {last[0]}") from error
    if skipped := [package for package in packages if "skip_reason" in package]:
        raise ToolError(
            f"{requirements.name} could not be audited: the advisory service does not know {len(skipped)} of "
            f"{len(packages)} packages, first {skipped[0]['name']} ({skipped[0]['skip_reason']}); run it where the "
            "package index is reachable"
        )
    if len(packages) < pins:
        raise ToolError(f"{requirements.name} could not be audited: {len(packages)} of {pins} packages were looked up")
    return [
        f"{package['name']} {package['version']}: {found['id']}, "
        + (f"fixed in {', '.join(found['fix_versions'])}" if found["fix_versions"] else "not fixed yet")
        for package in packages
        for found in package["vulns"]
    ]


def main(options: Sequence[str]) -> None:
    """Audit every file of requirements/; options go to pip-audit. Exits 1 for a finding or a failed audit."""
    failed = False
    for name in FILES:
        path = ROOT / "requirements" / f"{name}.txt"
        try:
            found = audit(path, options)
        except ToolError as error:
            found = [str(error)]
        failed = failed or bool(found)
        for line in found or [f"{path.name}: no known vulnerability"]:
            sys.stderr.write(f"{line}\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
