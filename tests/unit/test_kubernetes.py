"""The manifests of `deploy/kubernetes` as kustomize renders them: valid, and of one piece with the image and Triton."""

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
def test_each_manifest_is_what_the_api_takes(folder, version):
    """Strictly: a field that it does not know is an error. The operator's own kinds have no schema here."""
    checked = [manifest for manifest in rendered(folder) if "coreos.com" not in manifest["apiVersion"]]
    assert checked
    for manifest in checked:
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("name", OVERLAYS)
def test_each_selector_finds_the_servers_pods_and_only_clients_reach_them(name):
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
    """Variables of docs/container.md, ports by name, and somewhere to write under a read-only root."""
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


def test_the_autoscaler_asks_for_what_the_adapter_gives():
    scaler = of_kind(manifests := rendered("monitoring"), "HorizontalPodAutoscaler")["spec"]
    (rule,) = yaml.safe_load((KUBERNETES / "monitoring" / "adapter-rules.yaml").read_text())["rules"]["custom"]
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]
    server = of_kind(rendered("overlays/gpu"), "Deployment")
    assert scaler["scaleTargetRef"]["name"] == server["metadata"]["name"]
    monitor = of_kind(manifests, "ServiceMonitor")["spec"]
    service = of_kind(rendered("overlays/gpu"), "Service")
    assert service["metadata"]["labels"].items() >= monitor["selector"]["matchLabels"].items()
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "clip"  # the job of alerts and dashboard
    assert monitor["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_the_pages_command_makes_a_prometheus_rule_of_all_alerts():
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    (command,) = re.findall(r"^    \{ printf .*?$\n.*? \| kubectl apply -f -$", page, re.MULTILINE)
    shell = command.replace("kubectl apply -f -", "cat")
    made = yaml.safe_load(subprocess.run(["/bin/sh", "-c", shell], cwd=ROOT, capture_output=True, check=True).stdout)
    assert (made["apiVersion"], made["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    files = sorted((ROOT / "deploy" / "monitoring").glob("alerts*.yml"))
    assert made["spec"]["groups"] == [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]


def instances_by_gpu(config, gpus: int) -> list[int]:
    """How many instances of a model Triton makes on each GPU, as its page on instance groups says; none for the CPU.

    A group makes `count` on each GPU that it names, and on every GPU where it names none; KIND_AUTO takes GPUs where
    there are some.
    """
    made = [0] * gpus
    for group in config.instance_group:
        if group.kind != group.KIND_CPU:
            for gpu in group.gpus or range(gpus):
                made[gpu] += group.count
    return made


@pytest.mark.parametrize("config_name", [None, *config_names(MODELS)])
def test_an_engine_is_made_once_on_each_gpu_of_the_host(config_name):
    """One queue before them all. Those that run on the CPU have none there."""
    engine = engine_of(deployment(MODELS, config_name))
    expected = 0 if config_name in ("cpu-fp32", "cpu-bf16") else 1
    for gpus in (1, 4, 8):
        assert instances_by_gpu(engine.config, gpus) == [expected] * gpus
