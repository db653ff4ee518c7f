"""The accuracy gates: how close an engine's embeddings must be to open_clip's in FP32."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from clip_tools.errors import ToolError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
# With fewer, a percentile or a share of neighbours says little: one image of 100 is one per cent.
MIN_IMAGES = 100
# Two similarities that differ by less are a tie; no gate uses it. At the limit of FP32's gate an embedding is 0.0045
# off, which over 512 numbers is 0.0002 in any one direction. The difference of two similarities combines the errors of
# three images: its standard deviation is 0.0003 to 0.0004. TIE is three times that.
TIE = 0.001


@dataclass(frozen=True)
class Gate:
    """The lowest values that pass, for trained weights and at least `MIN_IMAGES` photographs; 0 means no limit."""

    worst_cosine: float
    mean_cosine: float = 0.0
    top1_agreement: float = 0.0


GATES: dict[Precision, Gate] = {
    "fp32": Gate(0.99999),
    "fp16": Gate(0.999),
    "bf16": Gate(0.99, 0.999),
    "int8": Gate(0.97, 0.99, 0.97),
    "fp8": Gate(0.97, 0.99, 0.97),
}
# For preprocess modes with pixels close to open_clip's but not equal: `fast`, for large JPEGs, and `gpu`.
NEAR_PIXELS = Gate(0.995, 0.999)


def gate_of(precision: Precision, *, exact_pixels: bool = True) -> Gate:
    """The gate of a precision. Without exact pixels: that or `NEAR_PIXELS`, whichever has the lower worst cosine."""
    gates = [GATES[precision]] if exact_pixels else [GATES[precision], NEAR_PIXELS]
    return min(gates, key=lambda gate: gate.worst_cosine)


def gate_name(precision: Precision, *, exact_pixels: bool = True) -> str:
    """The name of that gate in reports."""
    return precision if exact_pixels else f"{precision}, near pixels"


@dataclass(frozen=True)
class Agreement:
    """How well embeddings agree with open_clip's of the same images in FP32.

    Cosines are in [-1, 1]; `max_abs` is the largest difference of one element. `top1_agreement` is the share of images
    with the same nearest neighbour in the folder, `top5_agreement` the mean share of common images among the five
    nearest. `neighbours_kept` is `top1_agreement` without ties: a new neighbour also counts as kept if open_clip finds
    it at most `TIE` less similar.
    """

    images: int
    worst_cosine: float
    mean_cosine: float
    p1_cosine: float
    max_abs: float
    top1_agreement: float
    top5_agreement: float
    neighbours_kept: float
    worst_images: tuple[str, ...] = ()


def cosines(got: "npt.NDArray[np.float32]", reference: "npt.NDArray[np.float32]") -> "npt.NDArray[np.float64]":
    """(N,) float64: the cosine of each pair of rows, whatever their norms. NaN where a row is zero or not finite."""
    import numpy as np

    if got.shape != reference.shape:
        raise ToolError(f"expected embeddings of shape {reference.shape}, got {got.shape}")
    a, b = got.astype(np.float64), reference.astype(np.float64)
    with np.errstate(all="ignore"):
        cosine: npt.NDArray[np.float64] = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return cosine


def agreement(
    got: "npt.NDArray[np.float32]", reference: "npt.NDArray[np.float32]", names: tuple[str, ...] = ()
) -> Agreement:
    """How well (N, 512) embeddings agree with the reference, row by row. `names` are for `worst_images`."""
    import numpy as np

    cosine = cosines(got, reference)
    broken = not np.isfinite(cosine).all()
    shown = np.where(np.isfinite(cosine), cosine, -1.0)  # NaN must fail the gate
    near = _similarities(got), _similarities(reference)
    return Agreement(
        images=len(got),
        worst_cosine=_rounded(shown.min()),
        mean_cosine=_rounded(shown.mean()),
        p1_cosine=_rounded(np.percentile(shown, 1)),
        max_abs=float("inf") if broken else float(f"{np.abs(got - reference).max():.3g}"),
        top1_agreement=0.0 if broken else round(_same_neighbours(*near, 1), 4),
        top5_agreement=0.0 if broken else round(_same_neighbours(*near, 5), 4),
        neighbours_kept=0.0 if broken else round(_neighbours_kept(*near), 4),
        worst_images=tuple(names[index] for index in np.argsort(shown)[:3]) if names else (),
    )


def likely_neighbours_kept(
    got: "npt.NDArray[np.float32]", reference: "npt.NDArray[np.float32]", folder: "npt.NDArray[np.float32]"
) -> float:
    """The expected share of a folder's images that keep their nearest neighbour, ties aside, with errors like these.

    `got` (N, 512) are an engine's embeddings, `reference` the exact ones of the same images, `folder` the exact ones of
    all images. Counting changed neighbours among N images is too coarse if one in a hundred may change. So this takes
    the errors of the similarities as normally distributed, with the spread that these N images show, and compares it
    with the lead of each image's nearest neighbour over the others. 0 for fewer than three images, which show no
    spread.
    """
    import numpy as np

    if len(got) < 3:
        return 0.0
    off = (got.astype(np.float64) @ got.T) - (reference.astype(np.float64) @ reference.T)
    others = ~np.eye(len(off), dtype=bool)
    variances = [row[kept].var(ddof=1) for row, kept in zip(off, others, strict=True)]
    spread = np.sqrt(2 * np.mean(variances))  # of the difference of two
    similar = _similarities(folder)
    ahead = similar.max(axis=1, keepdims=True) - similar
    stays = np.vectorize(math.erfc)(-ahead / max(spread, 1e-12) / math.sqrt(2)) / 2
    return float(np.where(ahead > TIE, stays, 1).prod(axis=1).mean())


def failures(found: Agreement, gate: Gate, *, trained: bool) -> list[str]:
    """One line for each value below the gate; empty if it passes.

    The neighbours of untrained embeddings differ by no more than rounding, so only the cosines are compared there.
    """
    return [
        f"{name} {math.floor(got * 1e5 + 1e-6) / 1e5:.5f} is under {least}"  # rounded down
        for name, got, least in (
            ("worst cosine", found.worst_cosine, gate.worst_cosine),
            ("mean cosine", found.mean_cosine, gate.mean_cosine),
            ("share of nearest neighbours kept", found.top1_agreement, gate.top1_agreement if trained else 0.0),
        )
        if not got >= least
    ]


def counts_for_nothing(images: int, *, trained: bool) -> str | None:
    """Why passing the gate proves nothing, or None if it counts."""
    if not trained:
        return "untrained weights hide what breaks low precision"
    if images < MIN_IMAGES:
        return f"{images} images are too few: the gate requires {MIN_IMAGES}"
    return None


def gates_table() -> str:
    """The gates as the table of docs/precision.md."""
    lines = ["| precision | worst cosine | mean cosine | nearest neighbour the same |", "|---|---|---|---|"]
    gates: list[tuple[str, Gate]] = [*GATES.items(), ("any, near pixels", NEAR_PIXELS)]
    for name, gate in gates:
        cells = (
            f">= {gate.worst_cosine}",
            f">= {gate.mean_cosine}" if gate.mean_cosine else "",
            f">= {gate.top1_agreement:.0%}" if gate.top1_agreement else "",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rounded(value: float) -> float:
    """Rounded down to seven digits: rounding must never lift a value over its gate."""
    return math.floor(float(value) * 1e7) / 1e7


def _similarities(rows: "npt.NDArray[np.float32]") -> "npt.NDArray[np.float64]":
    """(N, N) float64: the similarity of each pair of rows; -inf on the diagonal."""
    import numpy as np

    wide = rows.astype(np.float64)
    similar: npt.NDArray[np.float64] = np.nan_to_num(wide @ wide.T)
    np.fill_diagonal(similar, -np.inf)
    return similar


def _same_neighbours(got: "npt.NDArray[np.float64]", reference: "npt.NDArray[np.float64]", count: int) -> float:
    """The mean share of each row's `count` nearest neighbours that both matrices of similarities have in common."""
    import numpy as np

    count = min(count, len(got) - 1)
    if count < 1:
        return 1.0
    nearest = (np.argsort(-similar, axis=1, kind="stable")[:, :count] for similar in (got, reference))
    return float(np.mean([len(set(a) & set(b)) / count for a, b in zip(*nearest, strict=True)]))


def _neighbours_kept(got: "npt.NDArray[np.float64]", reference: "npt.NDArray[np.float64]") -> float:
    """The share of rows whose nearest by `got` is the nearest by `reference` or tied with it."""
    import numpy as np

    if len(got) < 2:
        return 1.0
    now = reference[np.arange(len(got)), got.argmax(axis=1)]
    return float(np.mean(now >= reference.max(axis=1) - TIE))
