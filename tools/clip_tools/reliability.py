"""docs/reliability.md: what the server and the client promise, how each promise is tested, and the figures last seen.

The figures are those that the tests themselves recorded (`record_reliability`): `make test-long` writes them to
results/reliability.json, of which docs/results/reliability-MACHINE.json is a copy.
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
"""What each test recorded, by its name."""


@dataclass(frozen=True)
class Promise:
    """One sentence, and the name under which its test records what it saw."""

    entry: str
    sentence: str


PROMISES: dict[str, tuple[Promise, ...]] = {
    "Bad input": (
        Promise("fuzz_preprocess", "Any file is an image or is refused with a reason, in bounded time and memory."),
        Promise(
            "bounded_json",
            "Behind the nginx of `deploy/`, JSON that would bring Triton down or keep it busy does not reach it.",
        ),
        Promise("odd_files", "`clip-embed`: no file, whatever it is, ends a run or keeps it waiting."),
        Promise("fuzz_served", "Served, it is a vector or an `INVALID_ARG`; its neighbours get what they would alone."),
    ),
    "Too much": (
        Promise(
            "overload",
            "Of ten times the load it can bear, what is too much is refused at once and nothing hangs. "
            "The load is sent on the server's own cores, which costs throughput; CPU time shows the rest.",
        ),
        Promise("faults_half_open", "Clients that are slow or hold a half-sent request keep nobody else waiting."),
        Promise("soak", "Good and bad traffic from many clients for long: no memory, file or thread more."),
    ),
    "What breaks": (
        Promise("stub_killed", "A killed stub turns readiness off and is replaced."),
        Promise("stub_wedged", "So is one that hangs."),
        Promise(
            "storms",
            "gRPC calls that other clients cancel, let run out of time, or leave with their connection, do not end the "
            "embedded server, and its other clients lose nothing.",
        ),
        Promise(
            "storms_unprotected",
            "Where `ignore_cancellation.c` could not be built they may end it: the next one is started at once, and "
            "clients that wait lose nothing.",
        ),
        Promise(
            "left_midway",
            "Half-sent requests, and connections, streams and tasks that end before their answer, ten thousand of "
            "each, leave no file, thread or shared memory behind.",
        ),
        Promise("faults_server_killed", "A server killed under load: its clients wait for the next one on its port."),
        Promise("faults_replica_killed", "One of two servers killed under load: the other one answers."),
        Promise("faults_sigterm", "A server that is told to stop finishes what it has taken."),
        Promise("faults_upgrade", "A server replaced under a running `clip-embed`: every image is there, once."),
        Promise(
            "faults_resume_jsonl", "`clip-embed --resume` killed at any moment goes on: each image once, in JSON lines."
        ),
        Promise("faults_resume_parquet", "The same in Parquet."),
        Promise("faults_storm", "Two servers killed, replaced and frozen at random: every image has its vector, once."),
    ),
    "What is missing or in the way": (
        Promise("faults_full_disk", "A full disk: what was written stays whole, and `--resume` goes on."),
        Promise(
            "faults_small_shm", "A `/dev/shm` that is too small fails the large request with a sentence, nothing else."
        ),
        Promise("faults_read_only_models", "The model folder may be read-only."),
        Promise("faults_corrupt_model", "A damaged model file is refused in one line that says how to make it again."),
        Promise("faults_port_taken", "A port that is taken is named, with the option that chooses another."),
        Promise(
            "faults_clock_jump",
            "What the server and the client read of the clock may jump: deadlines are kept by another.",
        ),
    ),
    "Who may do what": (
        Promise(
            "closed_apis",
            "A stranger can embed and read health, configurations and metrics, and from the same machine metadata and "
            "statistics; every other call is refused.",
        ),
    ),
}
"""By heading. A test can record nothing under another name."""

_MACHINE = ("cpu", "cores", "gpu")
_HIDDEN = ("test", "date", "git_commit", *_MACHINE)
_UNITS = {"_throughput": " images/s", "_s": " s", "_ms": " ms", "_mb": " MB", "_mib": " MiB"}


def names() -> set[str]:
    """Under what a test may record what it saw."""
    return {promise.entry for promises in PROMISES.values() for promise in promises}


def where_and_when() -> dict[str, Any]:
    """What each entry keeps of the machine, the commit and the day: tests are run again one by one."""
    here = fingerprint()
    return {key: here[key] for key in (*_MACHINE, "git_commit")} | {"date": here["date"][:10]}


def committed(folder: Path = RESULTS) -> dict[str, Entries]:
    """The recorded entries of each machine."""
    return {
        path.stem.removeprefix("reliability-"): json.loads(path.read_text())
        for path in sorted(folder.glob("reliability-*.json"))
    }


def document(machines: dict[str, Entries]) -> str:
    """The Markdown; without any machine every promise is there, and none is measured."""
    parts = [
        "<!-- Generated by `make docs` from docs/results/reliability-*.json, which `make test-long` wrote. -->\n\n"
        "# Reliability\n\n"
        "What is promised, the test that shows it on the real server, and the figures that this test last recorded.\n"
        "`make test` runs a short form of each; `make test-long` the whole, and writes the figures.\n"
    ]
    for name, entries in machines.items() or {"": {}}.items():
        if entries:
            parts.append(f"## {name}\n\n{_machine(name, entries)}.\n")
        in_all = [{"what": what, "seen": seen} for what, seen in sums(entries).items()]
        parts.append(table("in all | last seen", "{what} | {seen}", in_all, align="---"))
        for heading, promises in PROMISES.items():
            rows = [{"sentence": one.sentence} | _seen(entries.get(one.entry)) for one in promises]
            row = "{sentence} | {figures} | {when} | {test}"
            parts.append(f"### {heading}\n\n" + table("promise | last seen | at commit | test", row, rows, align="---"))
    return "\n".join(parts)


def _machine(name: str, entries: Entries) -> str:
    """The one on which all were recorded. Raises ToolError for more than one."""
    machines = {tuple(entry[key] for key in _MACHINE) for entry in entries.values()}
    described = sorted(f"{cpu}, {cores} cores, {gpu or 'no GPU'}" for cpu, cores, gpu in machines)
    if len(described) > 1:
        raise ToolError(
            f"reliability-{name}.json: expected the figures of one machine, came those of {'; '.join(described)}; "
            "remove results/reliability.json and run `make test-long` on one"
        )
    return described[0]


def sums(entries: Entries) -> dict[str, str]:
    """What all tests of a machine saw together."""

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


def _seen(entry: dict[str, Any] | None) -> dict[str, str]:
    """The columns of a promise: every figure by its own name, when it was recorded, and the test."""
    if entry is None:
        return {"figures": NOT_MEASURED, "when": "", "test": ""}
    figures = "; ".join(_figure(key, value) for key, value in entry.items() if key not in _HIDDEN) or "held"
    path, _, name = str(entry["test"]).partition("::")
    test = f"[{name.partition('[')[0]}](../{path})"
    return {"figures": figures, "when": f"{entry['git_commit']}, {entry['date']}", "test": test}


def _figure(key: str, value: Any) -> str:
    for suffix, unit in _UNITS.items():
        if key.endswith(suffix) and isinstance(value, int | float):
            title = key if suffix == "_throughput" else key.removesuffix(suffix)
            return f"{title.replace('_', ' ')} {value:,}{unit}"
    shown = f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else value
    return f"{key.replace('_', ' ')} {shown}"
