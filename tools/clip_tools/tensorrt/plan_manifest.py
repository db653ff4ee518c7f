"""The manifest beside a TensorRT plan: its graph, library, GPU and options; and whether the plan still fits those."""

import json
import shlex
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from clip_tools.accuracy.gates import Precision
from clip_tools.digest import sha256_of
from clip_tools.gpu import Gpu, find_gpu
from clip_tools.tensorrt.runtime import Runtime, installed_version


@dataclass(frozen=True)
class PlanOptions:
    """How to build a plan.

    Args:
        runtime: the library that builds the plan and must run it.
        precision: the precision that the matrices must have; the ONNX graph decides it, and the build checks it.
        min_batch: the smallest batch of the one optimisation profile.
        opt_batch: the batch that it is tuned for.
        max_batch: the largest batch, which `max_batch_size` of the configuration may not exceed.
        workspace_mib: scratch memory for a layer; None: the library's default, the whole GPU.
        version_compatible: also runs on later versions of the same major version.
        hardware_compatible: also runs on other GPUs from Ampere on; `tensorrt` only.
        targets: compute capabilities that `tensorrt-rtx` builds for ahead of time, such as "8.9"; () means all that
            have the precision.
    """

    runtime: Runtime = "tensorrt"
    precision: Precision = "fp16"
    min_batch: int = 1
    opt_batch: int = 16
    max_batch: int = 64
    workspace_mib: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    targets: tuple[str, ...] = ()

    def command(self, onnx: str | None = None) -> str:
        """The command that builds with these options; it omits defaults."""
        words = ["clip-tools", "build-engine"]
        for name, value in asdict(self).items():
            flag = "--" + name.replace("_", "-")
            if name == "targets":
                words += [word for target in value for word in ("--target", target)]
            elif name in ("runtime", "precision") or value != getattr(PlanOptions(), name):
                words += [flag] if value is True else [flag, str(value)]
        return shlex.join([*words, *(["--onnx", onnx] if onnx else [])])


@dataclass(frozen=True)
class PlanManifest:
    """`manifest.json` beside a plan.

    `compute_capability` and `gpu` are those of the GPU that built it, None without one. `matrices` counts the matrix
    multiplications by precision, `weights` their weights, and `engine_layers` the engine's layers by the type that they
    write, if the runtime reports it. `trained` and `model` come from the ONNX manifest; None without one.
    """

    sha256: str
    onnx: str
    onnx_sha256: str
    runtime: Runtime
    runtime_version: str
    cuda: str | None
    gpu: str | None
    compute_capability: str | None
    targets: tuple[str, ...]
    precision: Precision
    min_batch: int
    opt_batch: int
    max_batch: int
    workspace_mib: int | None
    version_compatible: bool
    hardware_compatible: bool
    matrices: dict[str, int]
    build_s: float
    size_bytes: int
    date: str
    weights: dict[str, int] = field(default_factory=dict)
    engine_layers: dict[str, int] = field(default_factory=dict)
    model: str | None = None
    trained: bool | None = None

    @classmethod
    def read(cls, plan_path: Path) -> "PlanManifest | None":
        """The manifest beside the plan; None if it is missing or not a plan's."""
        try:
            found = json.loads(plan_manifest_path(plan_path).read_text())
            # Earlier versions had other fields.
            known = {one.name: found[one.name] for one in fields(cls) if one.name in found}
            return cls(**{**known, "targets": tuple(found["targets"])})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def to_json(self) -> str:
        """The content of the manifest file."""
        return json.dumps(asdict(self), indent=2)

    @property
    def options(self) -> PlanOptions:
        """The options that build it again."""
        return PlanOptions(**{one.name: getattr(self, one.name) for one in fields(PlanOptions)})


def plan_manifest_path(plan_path: Path) -> Path:
    """The path of a plan's manifest: `manifest.json` in its folder."""
    return plan_path.with_name("manifest.json")


def stale_reason(plan_path: Path, *, onnx_path: Path | None = None) -> str | None:
    """Why the plan does not fit, in one line with the command that builds it again; None if it fits.

    It compares the plan's bytes, the ONNX file (`onnx_path`, or the one of its name in the same repository), the
    version of the installed library, and the GPU. It skips what this machine does not have.
    """
    manifest = PlanManifest.read(plan_path)
    if manifest is None:
        return (
            f"{plan_path} has no {plan_manifest_path(plan_path).name} beside it that says what it was built for: "
            f"build it again with `{PlanOptions().command()}`"
        )
    onnx_path = onnx_path or plan_path.parents[2] / "clip_onnx" / "1" / manifest.onnx
    found = (
        _other_bytes(plan_path, manifest)
        or _other_runtime(manifest, installed_version(manifest.runtime))
        or _other_gpu(manifest, find_gpu())
        or _other_onnx(manifest, onnx_path)
    )
    return found and f"{plan_path} {found}: build it again with `{manifest.options.command()}`"


def _other_bytes(plan: Path, manifest: PlanManifest) -> str | None:
    if plan.is_file() and plan.stat().st_size == manifest.size_bytes and sha256_of(plan) == manifest.sha256:
        return None
    return "is not the file that its manifest describes"


def _other_runtime(manifest: PlanManifest, version: str | None) -> str | None:
    if version is None or version == manifest.runtime_version:
        return None
    if manifest.version_compatible:
        built, here = (tuple(map(int, text.split(".")[:2])) for text in (manifest.runtime_version, version))
        if built[0] == here[0] and here >= built:
            return None
    return f"was built by {manifest.runtime} {manifest.runtime_version}, but {version} is installed"


def _other_gpu(manifest: PlanManifest, gpu: Gpu | None) -> str | None:
    if gpu is None:
        return None
    if manifest.targets:
        if gpu.compute_capability in manifest.targets:
            return None
        return f"was built for compute capability {', '.join(manifest.targets)}, but this machine has {_title(gpu)}"
    if manifest.hardware_compatible and tuple(map(int, gpu.compute_capability.split("."))) >= (8, 0):
        return None
    if (gpu.name, gpu.compute_capability) == (manifest.gpu, manifest.compute_capability):
        return None
    return (
        f"was built on {manifest.gpu} (compute capability {manifest.compute_capability}), but this machine has "
        f"{_title(gpu)}"
    )


def _title(gpu: Gpu) -> str:
    return f"{gpu.name} ({gpu.compute_capability})"


def _other_onnx(manifest: PlanManifest, onnx_path: Path) -> str | None:
    if not onnx_path.is_file() or sha256_of(onnx_path) == manifest.onnx_sha256:
        return None
    return f"was built from another {manifest.onnx} than {onnx_path}"
