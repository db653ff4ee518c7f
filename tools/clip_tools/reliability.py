"""docs/reliability.md: what the server and the client promise, the test of each promise, and its last figures.

The tests record the figures themselves (`record_reliability`). `make test-long` writes them to
results/reliability.json; docs/results/reliability-MACHINE.json is a copy of it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_tools.errors import ToolError
from clip_tools.measuring.fingerprint import fingerprint
from clip_tools.measuring.tables import table
from clip_tools.paths import ROOT

RESULTS = ROOT / "docs" / "results"
DOCUMENT = ROOT / "docs" / "reliability.md"
NOT_MEASURED = "not measured"
LONG_RUN = "long or promise"
"""The marker expression of `make test-long`."""

Entries = dict[str, dict[str, Any]]
"""The figures that the tests recorded, by `Promise.entry`."""


@dataclass(frozen=True)
class Promise:
    """One sentence, and the name under which its test records its figures."""

    entry: str
    sentence: str


PROMISES: dict[str, tuple[Promise, ...]] = {
    "Bad input": (
        Promise(
            "fuzz_preprocess",
            "Every file is either decoded or refused with a reason, within bounded time and memory.",
        ),
        Promise(
            "bounded_json",
            "The nginx of `deploy/` blocks JSON that would stop Triton or keep it busy.",
        ),
        Promise("odd_files", "No file stops a run of `clip-embed` or makes it hang."),
        Promise(
            "fuzz_served",
            "The server answers every file with a vector or `INVALID_ARGUMENT`. Other images get the vector that they "
            "get when sent alone.",
        ),
    ),
    "Overload": (
        Promise(
            "overload",
            "At ten times the load it can serve, the server refuses the excess at once and nothing hangs. "
            "The clients run on the server's own cores, which costs throughput; images per CPU second show the rest.",
        ),
        Promise("faults_half_open", "Clients that are slow or leave a request half sent do not delay other clients."),
        Promise(
            "soak",
            "Good and bad traffic from many clients for a long time does not increase memory, open files or threads.",
        ),
    ),
    "Failures": (
        Promise("stub_killed", "When a model's process is killed, the server reports not ready and is replaced."),
        Promise("stub_wedged", "The same when a model's process hangs."),
        Promise(
            "storms",
            "Clients that cancel gRPC calls, let them time out or drop the connection do not stop the embedded server, "
            "and other clients lose nothing.",
        ),
        Promise(
            "storms_unprotected",
            "Without `ignore_cancellation.c` such calls may stop the server. The next one starts at once, and waiting "
            "clients lose nothing.",
        ),
        Promise(
            "left_midway",
            "Half-sent requests, and connections, streams and tasks that end before their answer, leave no open file, "
            "thread or shared memory behind. The test makes ten thousand of each.",
        ),
        Promise(
            "faults_server_killed",
            "When the server is killed under load, its clients wait for the next one on the same port.",
        ),
        Promise("faults_replica_killed", "When one of two servers is killed under load, the other one answers."),
        Promise("faults_sigterm", "A server that is told to stop finishes the requests it has accepted."),
        Promise(
            "faults_upgrade",
            "When the server is replaced during a run of `clip-embed`, every image is in the output once.",
        ),
        Promise(
            "faults_resume_jsonl",
            "`clip-embed --resume` continues after being killed at any moment; each image is in the JSON lines once.",
        ),
        Promise("faults_resume_parquet", "The same for Parquet."),
        Promise(
            "faults_storm",
            "While two servers are killed, replaced and frozen at random, every image gets its vector once.",
        ),
    ),
    "Missing resources": (
        Promise(
            "faults_full_disk",
            "When the disk is full, written results stay intact and `--resume` continues from there.",
        ),
        Promise(
            "faults_small_shm",
            "When `/dev/shm` is too small, only the large request fails, and its error names the cause.",
        ),
        Promise("faults_read_only_models", "The model folder may be read-only."),
        Promise(
            "faults_corrupt_model",
            "A damaged model file is refused in one line that says how to make it again.",
        ),
        Promise(
            "faults_port_taken",
            "When a port is in use, the error names it and the option that chooses another.",
        ),
        Promise(
            "faults_clock_jump",
            "Jumps of the system clock do not affect deadlines, on the server or the client.",
        ),
    ),
    "Access": (
        Promise(
            "closed_apis",
            "Without a key a client can embed and read health, configurations and metrics, and on the same machine "
            "metadata and statistics. Every other call is refused.",
        ),
    ),
}
"""The promises by heading. A test cannot record under any other name."""

_MACHINE = ("cpu", "cores", "gpu")
_HIDDEN = ("test", "date", "git_commit", *_MACHINE)
_UNITS = {"_throughput": " images/s", "_s": " s", "_ms": " ms", "_mb": " MB", "_mib": " MiB"}


def names() -> set[str]:
    """The names under which tests may record figures."""
    return {promise.entry for promises in PROMISES.values() for promise in promises}


def where_and_when() -> dict[str, Any]:
    """Machine, commit and day of an entry. Each entry has its own, because single tests are run again."""
    here = fingerprint()
    return {key: here[key] for key in (*_MACHINE, "git_commit")} | {"date": here["date"][:10]}


def committed(folder: Path = RESULTS) -> dict[str, Entries]:
    """The committed entries of each machine."""
    return {
        path.stem.removeprefix("reliability-"): json.loads(path.read_text())
        for path in sorted(folder.glob("reliability-*.json"))
    }


def document(machines: dict[str, Entries]) -> str:
    """The Markdown of docs/reliability.md. Without machines every promise is listed as not measured."""
    parts = [
        "<!-- Generated by `make docs` from docs/results/reliability-*.json, which `make test-long` wrote. -->\n\n"
        "# Reliability\n\n"
        "What the server and the client promise under bad input, overload and failures. Each promise has a test and\n"
        "the figures that this test last recorded. `make test` runs a short form of the tests; `make test-long` runs\n"
        "them whole and writes the figures.\n"
    ]
    for name, entries in machines.items() or {"": {}}.items():
        if entries:
            parts.append(f"## {name}\n\n{_machine(name, entries)}.\n")
        parts.append(table("total | last seen", map(" | ".join, sums(entries).items()), align="---"))
        for heading, promises in PROMISES.items():
            rows = (f"{one.sentence} | {_seen(entries.get(one.entry))}" for one in promises)
            parts.append(f"### {heading}\n\n" + table("promise | last seen | at commit | test", rows, align="---"))
    return "\n".join(parts)


def _machine(name: str, entries: Entries) -> str:
    """The machine on which all entries were recorded. Raises ToolError if there are several."""
    machines = {tuple(entry[key] for key in _MACHINE) for entry in entries.values()}
    described = sorted(f"{cpu}, {cores} cores, {gpu or 'no GPU'}" for cpu, cores, gpu in machines)
    if len(described) > 1:
        raise ToolError(
            f"reliability-{name}.json: expected the figures of one machine, found those of {'; '.join(described)}; "
            "remove results/reliability.json and run `make test-long` on one"
        )
    return described[0]


def sums(entries: Entries) -> dict[str, str]:
    """Totals over all tests of a machine."""

    def total(key: str, prefix: str = "") -> str:
        found = [entry[key] for name, entry in entries.items() if key in entry and name.startswith(prefix)]
        return f"{sum(found):,}" if found else NOT_MEASURED

    def overload(key: str) -> str:
        found = entries.get("overload", {}).get(key)
        return NOT_MEASURED if found is None else f"{found:,} images/s"

    memory = [
        f"{entry['memory_before_mb']:,.0f} → {entry['memory_after_mb']:,.0f} MB ({name.replace('_', ' ')})"
        for name, entry in entries.items()
        if {"memory_before_mb", "memory_after_mb"} <= entry.keys()
    ]
    return {
        "cases fuzzed": total("cases", "fuzz"),
        "faults injected": total("faults"),
        "requests sent": total("requests"),
        "requests lost": total("lost"),
        "images answered twice": total("twice"),
        "peak throughput": overload("peak_throughput"),
        "throughput under ten times the load": overload("overload_throughput"),
        "memory before → after": "<br>".join(memory) or NOT_MEASURED,
    }


def _seen(entry: dict[str, Any] | None) -> str:
    """The columns of a promise: figures such as `lost 0; ready again after 2.1 s`, when, and the test."""
    if entry is None:
        return f"{NOT_MEASURED} |  | "
    figures = "; ".join(_figure(key, value) for key, value in entry.items() if key not in _HIDDEN) or "passed"
    path, _, name = str(entry["test"]).partition("::")
    return f"{figures} | {entry['git_commit']}, {entry['date']} | [{name.partition('[')[0]}](../{path})"


def _figure(key: str, value: Any) -> str:
    for suffix, unit in _UNITS.items():
        if key.endswith(suffix) and isinstance(value, int | float):
            title = key if suffix == "_throughput" else key.removesuffix(suffix)
            return f"{title.replace('_', ' ')} {value:,}{unit}"
    shown = f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else value
    return f"{key.replace('_', ' ')} {shown}"
