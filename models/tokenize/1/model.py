"""Triton adapter of `clip_tokens`: `text` tensors in, `tokens` tensors or errors out."""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from clip_tokens import RefusedText, Tokenizer

# A gRPC status travels in HTTP/2 trailers, which clients cut off at 8 KiB by default. 64 reasons fit.
_MAX_REASON_CHARS = 80


class TritonPythonModel:
    """Tokenizes each request separately: a bad text fails only its own request."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        merges = Path(args["model_repository"]) / args["model_version"] / "merges.txt"
        try:
            self._tokenizer = Tokenizer(
                merges.read_text("utf-8").splitlines(),
                int(config["output"][0]["dims"][0]),
                max_text_bytes=int(config["parameters"]["max_text_bytes"]["string_value"]),
            )
        except (OSError, ValueError) as error:
            raise pb_utils.TritonModelException(
                f"tokenize: {merges}: {error}; `clip-tools export-onnx --text` writes it"
            ) from None

    def execute(self, requests):
        return [self._response(request) for request in requests]

    def _response(self, request):
        try:
            texts = pb_utils.get_input_tensor_by_name(request, "text").as_numpy()
            if texts.ndim != 2:  # Triton drops the batch dimension of a batch of 0 or 2**32
                return _invalid("text: expected the shape [N, 1] with N of 1 or more, got a batch size of 0")
            rows, refused = [], []
            for index, text_bytes in enumerate(texts.reshape(-1)):
                try:
                    rows.append(self._tokenizer.tokens(text_bytes))
                except RefusedText as error:
                    refused.append(f"[{index}] {error.code}: {error.reason[:_MAX_REASON_CHARS]}")
            if refused:
                return _invalid(f"text: {len(refused)} of {len(texts)} texts refused. {'; '.join(refused)}")
            return pb_utils.InferenceResponse([pb_utils.Tensor("tokens", np.stack(rows))])
        except Exception as error:
            message = f"tokenize failed: {type(error).__name__}: {error}"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INTERNAL))


def _invalid(message):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
