"""Fits a layer's weights to rounded inputs, then rounds them so that later ones correct the errors of earlier ones."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

_DAMPING = 0.01  # of the mean curvature, as in the paper: else constant channels would absorb any error
_BLOCK = 128  # channels whose errors are passed on in one product, for speed


def curvature(rows: "Floats") -> "npt.NDArray[np.float64]":
    """(K, K): how the squared error of a product with these (R, K) rows grows with errors of its weights; damped."""
    import numpy as np

    found: npt.NDArray[np.float64] = (rows.T @ rows).astype(np.float64)
    found[np.diag_indices_from(found)] += _DAMPING * np.diag(found).mean() + 1e-12
    return found


def fit_weights(weight: "Floats", exact: "Floats", seen: "Floats", curved: "npt.NDArray[np.float64]") -> "Floats":
    """(K, N) weights for which `seen @ weights` is closest to `exact @ weight`, by least squares near `weight`.

    Both inputs are (R, K), `curved` is the curvature of `seen`. This corrects the part of their difference that is a
    linear function of `seen`.
    """
    import numpy as np

    missing = seen.T @ ((exact - seen) @ weight)
    return weight + np.linalg.solve(curved, missing.astype(np.float64)).astype(np.float32)


def round_weights(steps: "Floats", curved: "npt.NDArray[np.float64]", to_grid: Callable[[Any], Any]) -> "Floats":
    """(K, N) weights on the grid whose product is closest to that of the exact ones (GPTQ, arXiv:2210.17323).

    `steps` are (K, N) weights in multiples of their scale, `curved` is the curvature of the rounded inputs, and
    `to_grid` rounds each number alone. Channels with much energy are rounded first, so that later ones correct them.
    """
    import numpy as np

    order = np.argsort(-np.diag(curved), kind="stable")
    spread = np.linalg.cholesky(np.linalg.inv(curved[np.ix_(order, order)]))
    spread = spread.T.astype(np.float32)  # upper triangular: how an error is shared out
    remaining = steps[order].astype(np.float32)
    rounded = np.empty_like(remaining)
    for start in range(0, len(remaining), _BLOCK):
        end = min(start + _BLOCK, len(remaining))
        errors = np.empty_like(remaining[start:end])
        for channel in range(start, end):
            rounded[channel] = to_grid(remaining[channel])
            errors[channel - start] = (remaining[channel] - rounded[channel]) / spread[channel, channel]
            remaining[channel:end] -= np.outer(spread[channel, channel:end], errors[channel - start])
        remaining[end:] -= spread[start:end, end:].T @ errors
    back = np.empty_like(rounded)
    back[order] = rounded
    return back
