"""docs/reliability.md shows the figures that tests recorded, and a soak fails if something grew."""

import random

import pytest

from clip_tools.errors import ToolError
from clip_tools.measuring.sections import soak_section
from clip_tools.measuring.soak import BOUNDS, figures, judge
from clip_tools.measuring.watch import theil_sen
from clip_tools.paths import ROOT
from clip_tools.reliability import LONG_RUN, NOT_MEASURED, PROMISES, document, names, where_and_when


def test_recording_under_an_unknown_name_is_refused(record_reliability):
    assert len(names()) == sum(map(len, PROMISES.values()))
    with pytest.raises(KeyError, match="faults_nowhere"):
        record_reliability("faults_nowhere", faults=1)


def test_make_test_long_uses_the_marker_expression_that_publishes_figures():
    assert f'-m "{LONG_RUN}"' in (ROOT / "Makefile").read_text()


def test_an_entry_says_where_and_when_it_was_recorded():
    assert where_and_when().keys() == entry().keys() - {"test"}


def entry(**seen: object) -> dict:
    where = {"cpu": "Some CPU", "cores": 2, "gpu": None, "git_commit": "0123"}
    return {"test": "tests/e2e/test_faults.py::test_it[100]", **where, "date": "2026-11-20", **seen}


def test_figures_are_summed_and_shown_beside_their_promise():
    machine = {
        "fuzz_preprocess": entry(cases=10_000, memory_before_mb=80.0, memory_after_mb=81.4),
        "fuzz_served": entry(cases=2_000),
        "faults_sigterm": entry(faults=1, requests=8, lost=0, ready_again_s=2.5, git_commit="4567"),
        "soak": entry(requests=4_000, lost=1),
    }
    words = document({"2core": machine})
    assert "## 2core\n\nSome CPU, 2 cores, no GPU.\n" in words
    for row in (
        "| cases fuzzed | 12,000 |",
        "| faults injected | 1 |",
        "| requests sent | 4,008 |",
        "| requests lost | 1 |",
        "| memory before → after | 80 → 81 MB (fuzz preprocess) |",
        "| requests 4,000; lost 1 | 0123, 2026-11-20 | [test_it](../tests/e2e/test_faults.py) |",
        "| faults 1; requests 8; lost 0; ready again 2.5 s | 4567, 2026-11-20 | [test_it]",
    ):
        assert row in words


def test_figures_of_two_machines_in_one_file_are_refused():
    with pytest.raises(ToolError, match="one machine, found those of Other CPU, 2 cores, no GPU; Some CPU, 2 cores"):
        document({"2core": {"soak": entry(), "overload": entry(cpu="Other CPU")}})


def test_a_promise_without_a_figure_is_shown_as_not_measured():
    words = document({})
    assert words.count(f"| {NOT_MEASURED} |  |  |") == sum(map(len, PROMISES.values()))
    assert f"| peak throughput | {NOT_MEASURED} |" in words


def test_theil_sen_ignores_outliers():
    x = list(range(40))
    y = [3 * value + (1000 if value % 5 == 0 else 0) for value in x]
    assert theil_sen(x, y) == pytest.approx(3, abs=0.5)
    assert theil_sen([1], [1]) == 0


def soaked(**rise_a_minute: float) -> list[dict[str, float]]:
    """An hour of samples, two a minute, with a little noise and the given rises."""
    dice = random.Random(0)  # noqa: S311
    level = {"private_mib": 2000.0, "open_files": 80, "threads": 150, "regions": 3, "shared_mib": 20.0, "p50_ms": 300.0}
    return [
        {"at_s": 30.0 * half_minute, "resident_mib": 2100.0}
        | {
            name: value * (1 + (name in ("private_mib", "p50_ms")) * dice.uniform(-0.01, 0.01))
            + half_minute / 2 * rise_a_minute.get(name, 0)
            for name, value in level.items()
        }
        for half_minute in range(120)
    ]


def test_a_soak_with_noise_alone_has_no_problem():
    assert [rise["problem"] for rise in judge(soaked())] == [""] * len(BOUNDS)


@pytest.mark.parametrize(
    ("name", "a_minute"),
    [
        ("private_mib", 1.5),
        ("open_files", 0.5),
        ("threads", 0.2),
        ("regions", 0.1),
        ("shared_mib", 0.1),
        ("p50_ms", 20),
    ],
)
def test_growth_is_a_problem_with_its_reason(name, a_minute):
    problems = [rise["problem"] for rise in judge(soaked(**{name: a_minute})) if rise["problem"]]
    assert len(problems) == 1
    assert problems[0].startswith(f"{BOUNDS[name].title}: +")
    assert BOUNDS[name].reason in problems[0]


def test_growth_in_the_first_half_is_no_problem():
    points = soaked()
    for point in points[:55]:
        point["private_mib"] /= 2
        point["regions"] = 1
    assert [rise["problem"] for rise in judge(points) if rise["problem"]] == []


def test_too_short_a_soak_is_not_judged():
    with pytest.raises(ToolError, match="soak for longer"):
        judge(soaked()[:4])
    assert [rise["name"] for rise in judge(soaked()[:30]) if rise["rise"] is None] == ["p50_ms"]


def test_a_soak_is_shown_with_its_problems():
    result = {
        "options": {"minutes": 60.0, "clients": 8, "bad_share": 0.1},
        "problems": ["memory, MiB: +99"],
        "calls": [
            {"kind": "few", "is_bad": False, "calls": 9000, "images": 20_000, "lost": 2, "p50_ms": 300, "p99_ms": 900},
            {"kind": "broken", "is_bad": True, "calls": 1000, "images": 3000, "lost": 0, "p50_ms": 300, "p99_ms": 900},
        ],
        "rises": judge(soaked()),
        "points": soaked(),
    }
    section = soak_section("soak-2core", result)
    assert "Failed:\n- memory, MiB: +99\n" in section.text
    assert "| few | 9,000 | 20,000 | 2 | 300 | 900 |" in section.text
    assert "memory, MiB" in section.pictures["soak-2core.svg"]
    seen = figures(result)
    assert (seen["requests"], seen["bad_requests"], seen["lost"]) == (10_000, 1000, 2)
    assert seen["memory_before_mb"] == result["points"][0]["private_mib"]
