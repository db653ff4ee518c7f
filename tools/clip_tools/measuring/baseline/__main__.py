"""Runs the service: `python -m clip_tools.measuring.baseline --port 8010`."""

import argparse

from clip_tools.demo import weights_from_environment
from clip_tools.errors import exits_with_reason
from clip_tools.measuring.baseline.service import BaselineOptions, serve
from clip_tools.oracle import Weights


def main() -> None:
    """Serve with the weights of the arguments, or those of CLIP_CHECKPOINT and CLIP_MODEL."""
    default = weights_from_environment()
    parser = argparse.ArgumentParser(prog="python -m clip_tools.measuring.baseline", description=__doc__)
    parser.add_argument("--model", default=default.model)
    parser.add_argument("--pretrained", default=default.pretrained)
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8010)
    given = parser.parse_args()
    with exits_with_reason("baseline"):
        serve(BaselineOptions(Weights(given.model, given.pretrained), given.precision, given.host, given.port))


if __name__ == "__main__":
    main()
