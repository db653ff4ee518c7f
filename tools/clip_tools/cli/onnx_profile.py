"""`clip-tools onnx-profile`."""

from clip_tools.cli.options import Output, measured, takes
from clip_tools.measuring.options import OnnxProfileOptions
from clip_tools.paths import RESULTS


@takes(OnnxProfileOptions)
def onnx_profile(options: OnnxProfileOptions, output: Output = RESULTS / "onnx-profile.json") -> None:
    """Show where the engine spends its time: session creation, operators, execution providers, scaling by batch."""
    from clip_tools.measuring import onnx_profile as verb

    measured(verb.onnx_profile, options, output, "onnxruntime")
