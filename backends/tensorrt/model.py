"""TensorRT as a Python-based Triton backend, for a server with a GPU that has no native one.

It reads the same `config.pbtxt` as Triton's own `tensorrt` backend. Each batch is one execution of the plan, by
`tensorrt` or `tensorrt_rtx`. With `optimization.cuda.graphs` it runs as the CUDA graph of the next larger `graph_spec`.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from trt_contract import PlanError, check_machine, find_tensorrt
from trt_runner import Cuda, PlanRunner


class TritonPythonModel:
    """One instance: one execution context and one CUDA stream."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        # The served repository links to this folder; messages should name the folder itself.
        folder = (Path(args["model_repository"]) / args["model_version"]).resolve()
        plan = folder / (config.get("default_model_filename") or "model.plan")
        try:
            check_machine(args["model_instance_kind"])
            trt = find_tensorrt(plan)
            cuda = Cuda(int(args["model_instance_device_id"]))
            self._runner = PlanRunner(plan, config, trt=trt, cuda=cuda)
        except PlanError as error:
            raise pb_utils.TritonModelException(f"{args['model_name']}: {error}") from None
        self._inputs = [entry["name"] for entry in config["input"]]
        self._outputs = [entry["name"] for entry in config["output"]]
        pb_utils.Logger.log_info(
            f"{args['model_instance_name']} runs {plan.name} with {trt.__name__} {trt.__version__} "
            f"on GPU {args['model_instance_device_id']}"
        )

    def execute(self, requests):
        """Run the plan once for all requests and give each its own rows, in order."""
        try:
            columns = {
                name: [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
                for name in self._inputs
            }
            results = self._runner.run(columns)
        except Exception as error:
            failure = pb_utils.TritonError(f"TensorRT failed: {error}", pb_utils.TritonError.INTERNAL)
            return [pb_utils.InferenceResponse(error=failure) for _ in requests]
        ends = np.cumsum([len(array) for array in columns[self._inputs[0]]])
        rows = [np.split(results[name], ends[:-1]) for name in self._outputs]
        # The rows are views of the runner's pinned buffer; Triton copies them before it calls execute again.
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(name, parts[i]) for name, parts in zip(self._outputs, rows, strict=True)]
            )
            for i in range(len(requests))
        ]

    def finalize(self):
        """Free the GPU's memory."""
        self._runner.close()
