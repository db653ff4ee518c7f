"""The real server answers the probes of the Kubernetes deployment."""

import httpx
import yaml

from clip_tools.paths import ROOT


def test_each_probe_is_answered_by_a_server_that_embeds(server):
    """tests/e2e/test_readiness.py has the answers of a server that does not embed."""
    path = ROOT / "deploy" / "kubernetes" / "base" / "deployment.yaml"
    (container,) = yaml.safe_load(path.read_text())["spec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["port"] == "http"
        assert httpx.get(server.options.http_url + asked["path"]).status_code == 200
