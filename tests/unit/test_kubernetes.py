"""The manifests of `deploy/kubernetes` as kustomize renders them: valid, and consistent with the image and Triton."""

import re
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from clip_tools.paths import MODELS, ROOT
from clip_tools.repository import config_names, deployment, engine_of

KUBERNETES = ROOT / "deploy" / "kubernetes"
KUBECTL = Path(sys.executable).with_name("kubectl")
OVERLAYS = ("cpu", "gpu", "gpus")
API_VERSIONS = ("1.30", "1.37")


def rendered(folder: str) -> list[dict]:
    done = subprocess.run([KUBECTL, "kustomize", KUBERNETES / folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(manifests: list[dict], kind: str) -> dict:
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


@pytest.mark.parametrize("version", API_VERSIONS)
@pytest.mark.parametrize("folder", [*(f"overlays/{name}" for name in OVERLAYS), "monitoring"])
def test_each_manifest_is_valid_for_the_kubernetes_api(folder, version):
    """Unknown fields are errors. Kinds of the Prometheus operator are left out: there is no schema for them here."""
    checked = [manifest for manifest in rendered(folder) if "coreos.com" not in manifest["apiVersion"]]
    assert checked
    for manifest in checked:
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("name", OVERLAYS)
def test_each_selector_matches_the_servers_pods_and_only_clients_may_connect(name):
    manifests = rendered(f"overlays/{name}")
    spec = of_kind(manifests, "Deployment")["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert labels == spec["selector"]["matchLabels"] == of_kind(manifests, "Service")["spec"]["selector"]
    for kind, field in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        assert of_kind(manifests, kind)["spec"][field] == {"matchLabels": labels}
    clients, _ = of_kind(manifests, "NetworkPolicy")["spec"]["ingress"]
    assert clients["from"] == [{"podSelector": {"matchLabels": {"clip-client": "true"}}}]


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_pod_has_what_the_container_needs(name):
    """It has only variables of docs/container.md, named ports, and writable folders under a read-only root."""
    (container,) = of_kind(manifests := rendered(f"overlays/{name}"), "Deployment")["spec"]["template"]["spec"][
        "containers"
    ]
    known = re.findall(r"`([A-Z_]+)`", (ROOT / "docs" / "container.md").read_text())
    assert {variable["name"] for variable in container["env"]} <= set(known)
    assert "command" not in container
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    assert {port["targetPort"] for port in of_kind(manifests, "Service")["spec"]["ports"]} == set(ports)
    pod = of_kind(manifests, "Deployment")["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert set(mounts) == {"/dev/shm", "/tmp", "/var/cache/clip-embed"}  # noqa: S108
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    claims = [m["metadata"]["name"] for m in manifests if m["kind"] == "PersistentVolumeClaim"]
    claim = mounts["/var/cache/clip-embed"].get("persistentVolumeClaim", {}).get("claimName")
    gpus = container["resources"]["limits"].get("nvidia.com/gpu", 0)
    assert (gpus, claims, claim) == {
        "cpu": (0, [], None),
        "gpu": (1, ["clip-plans"], "clip-plans"),
        "gpus": (4, ["clip-plans"], "clip-plans"),
    }[name]


def test_the_autoscaler_uses_the_metric_that_the_adapter_provides():
    scaler = of_kind(manifests := rendered("monitoring"), "HorizontalPodAutoscaler")["spec"]
    (rule,) = yaml.safe_load((KUBERNETES / "monitoring" / "adapter-rules.yaml").read_text())["rules"]["custom"]
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]
    server = of_kind(rendered("overlays/gpu"), "Deployment")
    assert scaler["scaleTargetRef"]["name"] == server["metadata"]["name"]
    monitor = of_kind(manifests, "ServiceMonitor")["spec"]
    service = of_kind(rendered("overlays/gpu"), "Service")
    assert service["metadata"]["labels"].items() >= monitor["selector"]["matchLabels"].items()
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "clip"  # the job that alerts and dashboard select
    assert monitor["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_the_documented_command_makes_a_prometheus_rule_of_all_alerts():
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    (command,) = re.findall(r"^    \{ printf .*?$\n.*? \| kubectl apply -f -$", page, re.MULTILINE)
    shell = command.replace("kubectl apply -f -", "cat")
    made = yaml.safe_load(subprocess.run(["/bin/sh", "-c", shell], cwd=ROOT, capture_output=True, check=True).stdout)
    assert (made["apiVersion"], made["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    files = sorted((ROOT / "deploy" / "monitoring").glob("alerts*.yml"))
    assert made["spec"]["groups"] == [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]


def instances_by_gpu(config, gpus: int) -> list[int]:
    """The number of instances that Triton creates on each GPU, as in its documentation of instance groups.

    A group creates `count` instances on each GPU that it names, or on every GPU if it names none. KIND_AUTO uses GPUs
    if there are any; KIND_CPU uses none.
    """
    made = [0] * gpus
    for group in config.instance_group:
        if group.kind != group.KIND_CPU:
            for gpu in group.gpus or range(gpus):
                made[gpu] += group.count
    return made


@pytest.mark.parametrize("config_name", [None, *config_names(MODELS)])
def test_an_engine_has_one_instance_on_each_gpu(config_name):
    """One queue feeds all GPUs. CPU engines have no instance on a GPU."""
    engine = engine_of(deployment(MODELS, config_name))
    expected = 0 if config_name in ("cpu-fp32", "cpu-bf16") else 1
    for gpus in (1, 4, 8):
        assert instances_by_gpu(engine.config, gpus) == [expected] * gpus
