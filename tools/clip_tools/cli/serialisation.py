"""`clip-tools serialisation`."""

from clip_tools.cli.options import Output, measured, takes
from clip_tools.measuring.options import SerialisationOptions
from clip_tools.paths import RESULTS


@takes(SerialisationOptions)
def serialisation(options: SerialisationOptions, output: Output = RESULTS / "serialisation.json") -> None:
    """Measure size and time of JSON, binary FP32, binary uint8 and JPEG messages, without a server."""
    from clip_tools.measuring import serialisation as verb

    measured(verb.serialisation, options, output, "encoding and decoding")
