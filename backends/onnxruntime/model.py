"""ONNX Runtime as a Python-based Triton backend, for a server that has no native one.

It reads the same `config.pbtxt` keys as Triton's own `onnxruntime` backend: `instance_group` kind,
`optimization.execution_accelerators`, `optimization.graph.level`, and the parameters `intra_op_thread_count`,
`inter_op_thread_count` and `cudnn_conv_algo_search`. One session run computes a whole batch. On a CPU without an
accelerator it uses OpenVINO if that is installed. Triton's own backend lacks two of its settings:

- `openvino_bf16`: OpenVINO in BF16; plain `openvino` is always FP32. With the parameter `parts`, the graph is several
  files that run one after the other, each in the precision given for it.
- `optimization.cuda.graphs`: runs every batch on a GPU as a CUDA graph.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from ort_bound import BoundSession
from ort_session import ConfigError, check_contract, open_session, session_settings


class TritonPythonModel:
    """One instance: one ONNX Runtime session."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        # The served repository links to this folder; messages should name the folder itself.
        folder = (Path(args["model_repository"]) / args["model_version"]).resolve()
        model_path = folder / (config.get("default_model_filename") or "model.onnx")
        try:
            settings = session_settings(config, args["model_instance_kind"], int(args["model_instance_device_id"]))
            self._session = open_session(model_path, settings)
            check_contract(config, self._session)
        except ConfigError as error:
            raise pb_utils.TritonModelException(f"{args['model_name']}: {error}") from None
        self._inputs = [entry["name"] for entry in config["input"]]
        self._outputs = [entry["name"] for entry in config["output"]]
        pb_utils.Logger.log_info(
            f"{args['model_instance_name']} runs {model_path.name} with {', then '.join(settings.names)}, "
            f"{settings.intra_op_threads or 'default'} threads"
        )

    def execute(self, requests):
        """Run the session once for all requests and give each its own rows, in order."""
        try:
            columns = {
                name: [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
                for name in self._inputs
            }
            feeds = columns
            if not isinstance(self._session, BoundSession):  # which joins them in memory that the GPU reads
                feeds = {
                    name: arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for name, arrays in columns.items()
                }
            results = self._session.run(self._outputs, feeds)
        except Exception as error:
            failure = pb_utils.TritonError(f"ONNX Runtime failed: {error}", pb_utils.TritonError.INTERNAL)
            return [pb_utils.InferenceResponse(error=failure) for _ in requests]
        ends = np.cumsum([len(array) for array in columns[self._inputs[0]]])
        rows = [np.split(result, ends[:-1]) for result in results]
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(name, parts[i]) for name, parts in zip(self._outputs, rows, strict=True)]
            )
            for i in range(len(requests))
        ]
