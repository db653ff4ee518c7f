"""`python -m clip_tools.audit`: whether a pinned package has a known vulnerability, as pip-audit's advisories say.

pip-audit passes what the advisory service does not know, as one that mirrors an index without advisories says of
everything. Here every package has to have been looked up, or the audit fails.
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
    """A line for each vulnerability among the pins of a file. Raises ToolError when not every pin was looked up."""
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
            f"{requirements.name} could not be audited: of {len(packages)} packages the advisory service did not know "
            f"{len(skipped)}, {skipped[0]['name']} first ({skipped[0]['skip_reason']}); ask where the package index "
            "itself is reached"
        )
    if len(packages) < pins:
        raise ToolError(f"{requirements.name} could not be audited: {len(packages)} of {pins} packages were looked up")
    return [
        f"{package['name']} {package['version']}: {found['id']}, "
        + (f"mended in {', '.join(found['fix_versions'])}" if found["fix_versions"] else "not mended yet")
        for package in packages
        for found in package["vulns"]
    ]


def main(options: Sequence[str]) -> None:
    """Audit every file of requirements/; further options go to pip-audit. Exits 1 for a finding, or no answer."""
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
