"""Weights for rounded inputs, and rounded themselves: each error is made good by the weights that are still free."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

_DAMPING = 0.01  # of the mean curvature, as in the paper: else channels that never stir would take any error
_BLOCK = 128  # channels whose errors reach the rest in one product: only for speed


def curvature(rows: "Floats") -> "npt.NDArray[np.float64]":
    """(K, K): how the squared error of a product with these (R, K) rows grows with errors of its weights; damped."""
    import numpy as np

    found: npt.NDArray[np.float64] = (rows.T @ rows).astype(np.float64)
    found[np.diag_indices_from(found)] += _DAMPING * np.diag(found).mean() + 1e-12
    return found


def fit_weights(weight: "Floats", exact: "Floats", seen: "Floats", curved: "npt.NDArray[np.float64]") -> "Floats":
    """(K, N) weights for which `seen @ weights` is nearest to `exact @ weight`, by least squares near `weight`.

    Both inputs are (R, K), `curved` is the curvature of `seen`. What their difference has in common with `seen` is put
    right without cost.
    """
    import numpy as np

    missing = seen.T @ ((exact - seen) @ weight)
    return weight + np.linalg.solve(curved, missing.astype(np.float64)).astype(np.float32)


def round_weights(steps: "Floats", curved: "npt.NDArray[np.float64]", to_grid: Callable[[Any], Any]) -> "Floats":
    """(K, N) weights on the grid for which the product stays nearest to what it was (GPTQ, arXiv:2210.17323).

    `steps` are (K, N) weights in multiples of their scale, `curved` is the curvature of the inputs as the layer will
    see them, and `to_grid` rounds each number by itself. Channels with much energy come first: later ones mend them.
    """
    import numpy as np

    order = np.argsort(-np.diag(curved), kind="stable")
    spread = np.linalg.cholesky(np.linalg.inv(curved[np.ix_(order, order)]))
    spread = spread.T.astype(np.float32)  # upper: how an error is shared out
    left = steps[order].astype(np.float32)
    rounded = np.empty_like(left)
    for start in range(0, len(left), _BLOCK):
        end = min(start + _BLOCK, len(left))
        errors = np.empty_like(left[start:end])
        for channel in range(start, end):
            rounded[channel] = to_grid(left[channel])
            errors[channel - start] = (left[channel] - rounded[channel]) / spread[channel, channel]
            left[channel:end] -= np.outer(spread[channel, channel:end], errors[channel - start])
        left[end:] -= spread[start:end, end:].T @ errors
    back = np.empty_like(rounded)
    back[order] = rounded
    return back
