"""Counts the matrix multiplications of a TensorRT network by precision, and checks that it has the requested one.

In a strongly typed network the types of the layers are those that run; TensorRT may fuse layers but not change a type.
TensorRT 11 has no other networks, and silently makes an FP32 engine of an FP32 graph (roboflow/rf-detr#1453).
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clip_tools.accuracy.gates import Precision

_NAMES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT8": "int8", "FP8": "fp8", "FP4": "fp4", "INT4": "int4"}
# The products in a layer. An attention is an input layer, with query and key, and an output layer.
_MATRIX_LAYERS = {"MATRIX_MULTIPLY": 1, "CONVOLUTION": 1, "DECONVOLUTION": 1, "EINSUM": 1, "ATTENTION_INPUT": 2}
_MOVING_LAYERS = ("SHUFFLE", "IDENTITY", "CAST", "SLICE", "SQUEEZE", "UNSQUEEZE")


@dataclass(frozen=True)
class Census:
    """The matrix multiplications in each precision, and their weights. Attention counts as two, a convolution as one.

    A weight is a number of a constant second factor. Almost all are multiplied with every token once, so their count
    measures the work.
    """

    matrices: Mapping[str, int]
    weights: Mapping[str, int]

    def mismatch(self, precision: Precision) -> str | None:
        """Why this is not an engine of that precision, in a sentence; None if it is.

        FP32, FP16 and BF16 require every matrix multiplication in that precision. INT8 and FP8 require at least half of
        the weights in it and the rest in FP16 or BF16: the products inside attention, and the layers that would fail
        the gate.
        """
        found = ", ".join(f"{count} in {name}" for name, count in self.matrices.items()) or "none"
        if not self.matrices:
            return "the network has no matrix multiplication at all: is it an image tower?"
        if precision in ("int8", "fp8"):
            strangers = set(self.matrices) - {precision, "fp16", "bf16"}
            share = self.weights.get(precision, 0) / max(1, sum(self.weights.values()))
            if strangers or share < 0.5:
                return (
                    f"asked for {precision}, and the matrices run {found}; {share:.0%} of the weights are multiplied "
                    f"in {precision}, and at least half must be"
                )
            return None
        return None if set(self.matrices) == {precision} else f"asked for {precision}, and the matrices run {found}"


def count_network(network: Any, trt: Any) -> Census:
    """The census of an `INetworkDefinition`, before or after the build."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    kernels = {"CONVOLUTION": trt.IConvolutionLayer, "DECONVOLUTION": trt.IDeconvolutionLayer}
    matrices: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for layer in layers:
        if layer.type.name not in _MATRIX_LAYERS:
            continue
        factors = [layer.get_input(i) for i in range(layer.num_inputs) if layer.get_input(i) is not None][:2]
        name = _precision_of(factors, makers)
        matrices[name] += _MATRIX_LAYERS[layer.type.name]
        if len(factors) == 1 and layer.type.name in kernels:
            layer.__class__ = kernels[layer.type.name]  # TensorRT's Python API has no other cast
            weights[name] += int(layer.kernel.size)
        elif len(factors) > 1 and _comes_from_constant(factors[1], makers):
            weights[name] += math.prod(factors[1].shape)
    return Census(dict(matrices.most_common()), dict(weights.most_common()))


def count_engine(inspector_json: str) -> dict[str, int]:
    """How many layers of the built engine write each type, by its inspector; empty if that reports no types."""
    counts: Counter[str] = Counter()
    for layer in json.loads(inspector_json).get("Layers", []):
        for output in layer.get("Outputs", []) if isinstance(layer, dict) else []:
            text = str(output.get("Format/Datatype", ""))
            if text:
                counts[text.rsplit(maxsplit=1)[-1]] += 1
    return dict(counts.most_common())


def _precision_of(factors: list[Any], makers: Mapping[str, Any]) -> str:
    """The type that the factors are multiplied in: what they were quantised to, if all were; else their own."""
    quantised = {_quantised_type(factor, makers) for factor in factors}
    only = quantised.pop() if len(quantised) == 1 else None
    return _NAMES.get(only or factors[0].dtype.name, (only or factors[0].dtype.name).lower())


def _quantised_type(tensor: Any, makers: Mapping[str, Any]) -> str | None:
    """The type that a DequantizeLinear made this tensor from, behind layers that only move numbers; else None."""
    layer = makers.get(tensor.name)
    while layer is not None and layer.type.name in _MOVING_LAYERS:
        layer = makers.get(layer.get_input(0).name)
    if layer is None or layer.type.name != "DEQUANTIZE":
        return None
    return str(layer.get_input(0).dtype.name)


def _comes_from_constant(tensor: Any, makers: Mapping[str, Any]) -> bool:
    layer = makers.get(tensor.name)
    while layer is not None and layer.type.name in (*_MOVING_LAYERS, "DEQUANTIZE", "QUANTIZE"):
        layer = makers.get(layer.get_input(0).name)
    return layer is not None and layer.type.name == "CONSTANT"
