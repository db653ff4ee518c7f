"""Runs a graph piece by piece on a set of images, so that the result at one layer can change the layers after it."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from clip_tools.export.onnx_runner import open_session

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx

Rewrite = Callable[["onnx.ModelProto"], "onnx.ModelProto"]
_BATCH = 8


class Stepwise:
    """Images on their way through a graph, stopped before one of its nodes.

    `batches` has one dict for each batch of images: the value of every tensor that a later node reads.
    """

    def __init__(self, model: "onnx.ModelProto", pixels: "npt.NDArray[np.uint8]") -> None:
        """Start before the first node; `pixels` are (N, 224, 224, 3) uint8."""
        self._model = model
        self._nodes = list(model.graph.node)
        self._at = 0
        self._sizes = [min(_BATCH, len(pixels) - start) for start in range(0, len(pixels), _BATCH)]
        self.batches: list[dict[str, Any]] = [
            {"pixels": pixels[start : start + _BATCH]} for start in range(0, len(pixels), _BATCH)
        ]

    @property
    def sizes(self) -> list[int]:
        """How many images are in each batch."""
        return self._sizes

    def run_to(self, node: Any, rewrite: Rewrite = lambda model: model) -> list[Any]:
        """Run the nodes before this one, changed by `rewrite`; return the first input of the node for each batch."""
        end = self._nodes.index(node, self._at)
        later = {name for following in self._nodes[end:] for name in following.input}
        if end > self._at:
            session = self._session(self._nodes[self._at : end], later, rewrite)
            for batch in self.batches:
                batch.update(self._outputs(session, batch))
                for name in set(batch) - later:
                    del batch[name]
            self._at = end
        return [batch[node.input[0]] for batch in self.batches]

    def finish(self, rewrite: Rewrite = lambda model: model) -> "npt.NDArray[np.float32]":
        """(N, 512) embeddings: runs the remaining nodes, changed by `rewrite`, and leaves the images where they are."""
        import numpy as np

        session = self._session(self._nodes[self._at :], {"embedding"}, rewrite)
        found: npt.NDArray[np.float32] = np.concatenate(
            [self._outputs(session, batch)["embedding"] for batch in self.batches]
        )
        return found

    def _session(self, nodes: Sequence[Any], outputs: set[str], rewrite: Rewrite) -> Any:
        """A session of these nodes: it reads the stored tensors and returns those of `outputs` that it computes."""
        import onnx
        from onnx import helper

        read = {name for node in nodes for name in node.input}
        made = {name for node in nodes for name in node.output}
        piece = onnx.ModelProto(ir_version=self._model.ir_version, opset_import=self._model.opset_import)
        piece.graph.name = "piece"
        piece.graph.node.extend(nodes)
        piece.graph.initializer.extend(tensor for tensor in self._model.graph.initializer if tensor.name in read)
        for name, value in self.batches[0].items():
            if name in read:
                kind = helper.np_dtype_to_tensor_dtype(value.dtype)
                piece.graph.input.append(helper.make_tensor_value_info(name, kind, None))
        piece.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(made & outputs))
        return open_session(rewrite(piece))

    @staticmethod
    def _outputs(session: Any, batch: dict[str, Any]) -> dict[str, Any]:
        names = [output.name for output in session.get_outputs()]
        values = session.run(names, {given.name: batch[given.name] for given in session.get_inputs()})
        return dict(zip(names, values, strict=True))
