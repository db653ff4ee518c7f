"""Every alert and panel of `deploy/monitoring` queries series that the real server exports."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import promql_parser
import pytest
import yaml

from clip_embed import EmbeddingClient, InvalidImageError
from clip_tools.gpu import find_gpu
from clip_tools.paths import ROOT
from clip_tools.serving.probe import probe_image

MONITORING = ROOT / "deploy" / "monitoring"
PAGE = ROOT / "docs" / "monitoring.md"
PROMETHEUS_OWN = {"up"}
# From Triton's documentation of its metrics.
OF_A_GPU = {"nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes"}


def expressions() -> dict[str, list[str]]:
    """The PromQL expressions of each alert and panel, by its name."""
    found: dict[str, list[str]] = {}
    for path in MONITORING.glob("alerts*.yml"):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                found.setdefault(rule["alert"], []).append(rule["expr"])
    for panel in json.loads((MONITORING / "dashboard.json").read_text())["panels"]:
        plain = [target["expr"].replace("$__rate_interval", "1m") for target in panel["targets"]]
        found.setdefault(panel["title"], []).extend(expr.replace("$instance", ".*") for expr in plain)
    (rule,) = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "monitoring" / "adapter-rules.yaml").read_text())[
        "rules"
    ]["custom"]
    query = rule["metricsQuery"].replace("<<.LabelMatchers>>", 'namespace="n",pod="p"').replace("<<.GroupBy>>", "pod")
    return found | {"clip_queue_us": [rule["seriesQuery"], query]}


EXPRESSIONS = expressions()


def selectors(node: Any) -> Iterator[Any]:
    """The series selectors of a parsed expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for part in ("lhs", "rhs", "expr", "param", "vector_selector", "args"):
        child = getattr(node, part, None)
        for one in child if isinstance(child, list) else [child]:
            if one is not None and not isinstance(one, str):
                yield from selectors(one)


def matches(selector: Any, labels: dict[str, str]) -> bool:
    """Whether the selector matches a series with these labels. Labels that Prometheus adds are ignored."""
    added = ("job", "instance", "namespace", "pod")
    wanted = [one for one in selector.matchers.matchers if one.name not in added]
    return all(re.fullmatch(one.value, labels.get(one.name, "")) for one in wanted)


@pytest.fixture(scope="module")
def series(server) -> dict[str, list[dict[str, str]]]:
    """The labels of each exported series by metric name, after a good image and a bad one."""
    with EmbeddingClient(server.options.grpc_url) as client:
        client.embed([probe_image()])
        with pytest.raises(InvalidImageError):
            client.embed([b"no image"])
    found: dict[str, list[dict[str, str]]] = {}
    for line in httpx.get(server.options.metrics_url).text.splitlines():
        if not line.startswith("#"):
            name, labels = re.match(r"([a-z_]+)(?:\{(.*)\})?", line).groups()
            found.setdefault(name, []).append(dict(re.findall(r'(\w+)="([^"]*)"', labels or "")))
    return found


@pytest.mark.parametrize("title", EXPRESSIONS)
def test_an_alert_or_panel_queries_series_that_exist(title, series):
    """Series of a GPU are checked only where there is one."""
    for expression in EXPRESSIONS[title]:
        asked = list(selectors(promql_parser.parse(expression)))
        assert asked, expression
        for selector in asked:
            if selector.name in PROMETHEUS_OWN:
                continue
            if selector.name not in OF_A_GPU or find_gpu():
                assert any(matches(selector, labels) for labels in series.get(selector.name, [])), selector


def test_refusals_are_counted_by_code_and_images_once(server):
    """Also in a request with several images, and whichever process decodes them."""

    def counted() -> dict[str, float]:
        lines = httpx.get(server.options.metrics_url).text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = counted()
    with EmbeddingClient(server.options.grpc_url) as client, pytest.raises(InvalidImageError):
        client.embed([b"no image", probe_image(), b"", b"none either"])
    after = counted()
    grown = {
        name: after[name] - before[name] for name in after if "clip_refused" in name and after[name] > before[name]
    }
    assert grown == {
        'clip_refused_images{code="not_an_image"}': 2,
        'clip_refused_images{code="empty"}': 1,
    }
    assert after["clip_images"] >= before["clip_images"] + 4
    assert after["clip_decode_cpu_seconds"] > before["clip_decode_cpu_seconds"]


def test_the_page_lists_exactly_the_series_in_use():
    used = {
        selector.name
        for group in EXPRESSIONS.values()
        for expression in group
        for selector in selectors(promql_parser.parse(expression))
    }
    assert set(re.findall(r"^\| `([a-z_]+)` \|", PAGE.read_text(), re.MULTILINE)) == used - PROMETHEUS_OWN


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool: apt-get install prometheus")
def test_promtool_accepts_the_prometheus_configuration():
    subprocess.run(["promtool", "check", "config", MONITORING / "prometheus.yml"], check=True, capture_output=True)
