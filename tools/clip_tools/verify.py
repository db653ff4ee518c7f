"""`clip-tools verify`: compares an engine's embeddings with open_clip's in FP32, and judges them by the gate."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_embed import EmbeddingClient
from clip_embed.credentials import environment_options
from clip_tools.accuracy import gates
from clip_tools.accuracy.gates import Agreement, Gate, Precision
from clip_tools.accuracy.reference import reference
from clip_tools.accuracy.texts import texts
from clip_tools.digest import sha256_of
from clip_tools.errors import ToolError
from clip_tools.export.onnx_runner import run_onnx
from clip_tools.measuring.plots import COLOURS, labelled, new_axes
from clip_tools.measuring.services import triton_service
from clip_tools.measuring.variants import Variant
from clip_tools.measuring.workload import weights_of
from clip_tools.oracle import Orientation, Weights, load_oracle, load_tokenizer
from clip_tools.progress import Tell, silent
from clip_tools.repository import engine_of, text_deployment
from clip_tools.serving.engine import Engine, has_exact_pixels, orientation_of, precision_of_engine, unchanged_graph_of
from clip_tools.tensorrt.plan_manifest import PlanManifest

Rows = npt.NDArray[np.float32]  # (N, D)
_BATCH = 8


@dataclass(frozen=True)
class Verdict:
    """The agreement, its gate, and whether it passed.

    `what` was embedded: images or texts. `exact_pixels`: the pixels must equal open_clip's. `orientation` of the images
    is the same on both sides. `how` names what computed the embeddings. `counts_for_nothing` is why a pass proves
    nothing; None if it counts. `cosines` are in the order of the images.
    """

    engine: str
    sha256: str | None
    precision: Precision
    exact_pixels: bool
    gate: Gate
    model: str
    trained: bool
    how: str
    agreement: Agreement
    failures: tuple[str, ...]
    counts_for_nothing: str | None
    images_sha256: str
    cosines: tuple[float, ...]
    what: str = "images"
    orientation: Orientation = "ignore"

    @property
    def gate_name(self) -> str:
        """How the gate is called in the report."""
        return gates.gate_name(self.precision, exact_pixels=self.exact_pixels)

    @property
    def passed(self) -> bool:
        """Whether nothing is under the gate."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without the cosine of each image."""
        fields = asdict(self)
        del fields["cosines"]
        return fields | {"gate_name": self.gate_name, "passed": self.passed}


def verify(
    engine: Engine,
    weights: Weights | None,
    images: Sequence[Path],
    *,
    precision: Precision | None = None,
    orientation: Orientation | None = None,
    tell: Tell = silent,
) -> Verdict:
    """Compare the engine with open_clip in FP32 on the images.

    What is None comes from the engine: `weights` from its manifest, `precision` from its manifest or graph (FP32 for a
    URL), `orientation` from its configuration ("ignore" for a URL). Raises ToolError if the engine cannot run, or has
    other weights than given.
    """
    file = engine.model_file
    held_to = precision or precision_of_engine(engine)
    if weights is None and file is None:  # a running server's are taken for this checkout's; others fail by far
        weights = _weights(None, engine.models / "clip_onnx" / "1" / "model.onnx")
    else:
        weights = _weights(weights, file)
    tell("open_clip in FP32", 0, len(images))
    turned = orientation or orientation_of(engine)
    expected = reference(weights, images, orientation=turned)
    tell("open_clip in FP32", len(images), len(images))

    def ask(client: EmbeddingClient) -> Rows:
        rows = []
        for start in range(0, len(images), _BATCH):
            rows.append(client.embed([path.read_bytes() for path in images[start : start + _BATCH]]))
            tell("the engine", min(start + _BATCH, len(images)), len(images))
        return np.concatenate(rows)

    embeddings, how = _embed(engine, expected.pixels, ask, tell)
    return _verdict(
        engine,
        weights,
        embeddings,
        expected.embeddings,
        expected.names,
        sha256=sha256_of(file) if file and file.is_file() else None,
        precision=held_to,
        exact_pixels=has_exact_pixels(engine),
        how=how,
        images_sha256=expected.images_sha256,
        orientation=turned,
    )


def _verdict(
    engine: Engine,
    weights: Weights,
    embeddings: Rows,
    expected: Rows,
    names: tuple[str, ...],
    *,
    precision: Precision,
    exact_pixels: bool = True,
    **rest: Any,
) -> Verdict:
    """The verdict on an engine's (N, D) embeddings beside open_clip's; `rest` are its other fields."""
    found, trained = gates.agreement(embeddings, expected, names), weights.seed is None
    gate = gates.gate_of(precision, exact_pixels=exact_pixels)
    return Verdict(
        engine=engine.title,
        precision=precision,
        exact_pixels=exact_pixels,
        gate=gate,
        model=weights.model,
        trained=trained,
        agreement=found,
        failures=tuple(gates.failures(found, gate, trained=trained)),
        counts_for_nothing=gates.counts_for_nothing(len(names), trained=trained),
        cosines=tuple(float(value) for value in gates.cosines(embeddings, expected)),
        **rest,
    )


def verify_text(engine: Engine, weights: Weights | None, *, tell: Tell = silent) -> Verdict:
    """As `verify`, for a text tower on this project's texts: a file, a configuration to serve, or a running server."""
    some = texts()
    served = text_deployment(engine.models, engine.config_name)
    if not (engine.file or engine.url or served):
        raise ToolError(f"{engine.models} has no text tower: make it with `clip-tools export-onnx --text`", exit_code=2)
    file = engine.file or (engine_of(served).file if served else None)
    weights = _weights(weights, file)
    tell("open_clip in FP32", 0, len(some))
    tokens = load_tokenizer(weights.model)(some).numpy()
    expected = load_oracle(weights).embed_tokens(tokens)
    tell("open_clip in FP32", len(some), len(some))
    embeddings, how = _embed(engine, tokens, lambda client: client.embed_text(some), tell)
    return _verdict(
        engine,
        weights,
        embeddings,
        expected,
        tuple(some),
        sha256=sha256_of(file) if file and not engine.url else None,
        precision="fp32",
        how=how,
        images_sha256=hashlib.sha256("\0".join(some).encode()).hexdigest(),
        what="texts",
    )


def _weights(given: Weights | None, file: Path | None) -> Weights:
    """The weights to compare with: those given, else the manifest's; refused when the two are known to differ."""
    known = unchanged_graph_of(file) if file else None
    if given is None:
        if known is None:
            raise ToolError(
                "nothing here says which weights to compare with: give --model and --pretrained, those of the server",
                exit_code=2,
            )
        return weights_of(*known)
    if known and (manifest := known[1]).identity != given.identity:
        raise ToolError(
            f"{file} was made of {manifest.model}, {manifest.pretrained}, and is to be compared with "
            f"{given.model}, {given.pretrained}: leave --pretrained out, or give the same",
            exit_code=2,
        )
    return given


def _embed(
    engine: Engine, inputs: npt.NDArray[Any], ask: Callable[[EmbeddingClient], Rows], tell: Tell
) -> tuple[Rows, str]:
    """(The embeddings of a file that is run on `inputs`, or of a server that is asked; what computed them)."""
    if engine.file is None:
        with _client(engine) as client:
            return ask(client), f"served, through clip_embed ({engine.title})"
    if engine.file.suffix == ".plan":
        from clip_tools.tensorrt.plan_runner import run_plan

        manifest = PlanManifest.read(engine.file)
        runtime = manifest.runtime if manifest else "tensorrt"
        return run_plan(engine.file, inputs, runtime=runtime), f"{runtime} on the GPU"
    run = run_onnx(engine.file, inputs, tell=tell, what="the engine")
    return run.embeddings, run.how


@contextmanager
def _client(engine: Engine) -> Iterator[EmbeddingClient]:
    """A client of the running server, or of one that is started for the engine, which requires no key."""
    with ExitStack() as stack:
        url, options = engine.url, environment_options(os.environ)
        if not url:
            url, options = stack.enter_context(triton_service(Variant(engine.config_name), engine.models)).url, {}
        try:
            client = EmbeddingClient(url, timeout_s=120, **options)
        except ValueError as error:
            raise ToolError(str(error), exit_code=2) from error
        yield stack.enter_context(client)


def verdict_table(verdict: Verdict) -> Any:
    """The figures beside what the gate asks for, as a rich table."""
    from rich.table import Table

    gate, found = verdict.gate, verdict.agreement
    images = ", images turned by their EXIF" if verdict.orientation == "exif" else ""
    title = f"{verdict.engine} against open_clip in FP32: {verdict.model}{images}"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column(f"{found.images} {verdict.what}", justify="right")
    table.add_column(f"gate of {verdict.gate_name}", justify="right")
    for title, value, least in (
        ("worst cosine", f"{found.worst_cosine:.6f}", gate.worst_cosine),
        ("mean cosine", f"{found.mean_cosine:.6f}", gate.mean_cosine),
        ("1st percentile", f"{found.p1_cosine:.6f}", 0.0),
        ("largest difference", f"{found.max_abs:.2g}", 0.0),
        ("nearest neighbour the same", f"{found.top1_agreement:.1%}", gate.top1_agreement),
        (f"or within {gates.TIE} of it", f"{found.neighbours_kept:.1%}", 0.0),
        ("of the nearest five", f"{found.top5_agreement:.1%}", 0.0),
    ):
        table.add_row(title, value, f">= {least}" if least else "")
    table.caption = f"{'passed' if verdict.passed else 'FAILED'}; by {verdict.how}"
    return table


def draw_histogram(verdict: Verdict, picture: Path) -> None:
    """Draw how far each image's embedding is from open_clip's (1 - cosine, logarithmic) with the gate, as a PNG."""
    distances = np.clip(1 - np.nan_to_num(np.array(verdict.cosines), nan=-1.0), 1e-8, None)
    allowed = 1 - verdict.gate.worst_cosine
    low, high = min(distances.min(), allowed) / 2, max(distances.max(), allowed) * 2
    axes = new_axes()
    axes.hist(distances, bins=np.geomspace(low, high, 40).tolist(), color=COLOURS[0])
    axes.set_xscale("log")
    axes.axvline(allowed, color=COLOURS[1], label=f"gate of {verdict.gate_name}: worst cosine {1 - allowed:g}")
    picture.parent.mkdir(parents=True, exist_ok=True)
    title = f"{verdict.engine}, {verdict.model}, {len(distances)} images"
    labelled(axes, title, "1 - cosine to open_clip in FP32", "images").savefig(picture, dpi=110)
