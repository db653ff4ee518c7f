"""Triton adapter of `clip_preprocess`: `image_bytes` tensors in, `pixels` tensors or errors out."""

import faulthandler
import json
import os
import time

import numpy as np
import triton_python_backend_utils as pb_utils
from PIL import AvifImagePlugin, Image

import clip_heif
import clip_resample
from clip_metrics import Counters
from clip_preprocess import PixelBudget, RefusedImage, open_pixels

# A gRPC status travels in HTTP/2 trailers, which clients cut off at 8 KiB by default.
_MAX_MESSAGE_CHARS = 4000

# A decoder that hangs ends its process after so long, with its stack in the log, and whoever watches over the server
# starts it anew. The slowest file within the limits takes some seconds.
_LONGEST_DECODE_S = 60

# The engine goes first where both want the same cores: what is decoded for requests that then find its queue full is
# lost. At ten times the load of two cores: 14.6 and 15.6 images a second of CPU without this, 15.2 and 18.6 with it;
# 20.5 at a load that they bear.
_NICENESS = 10


class TritonPythonModel:
    """Decodes each request by itself: a bad image fails its own request and no other."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        value = {key: parameter["string_value"] for key, parameter in config["parameters"].items()}
        value["side_px"] = self._side_px = int(config["output"][0]["dims"][0])
        try:
            self._pixels_of = open_pixels(value, int(args["model_instance_device_id"]))
            self._max_request_pixels = int(value["max_request_pixels"])
        except ValueError as error:
            raise pb_utils.TritonModelException(f"preprocess: {error}") from None
        self._counters = Counters(pb_utils)
        os.nice(_NICENESS)
        AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # more instances use more cores, not more threads
        Image.init()
        formats = set(value["formats"].split())
        if clip_heif.NAME in formats and (why := clip_heif.missing_opener()):
            pb_utils.Logger.log_warn(f"preprocess accepts no HEIC and HEIF: {why}")
            formats.remove(clip_heif.NAME)
        if unknown := formats - set(Image.OPEN):
            raise pb_utils.TritonModelException(
                f"preprocess: parameter formats has {', '.join(sorted(unknown))}; "
                f"this Pillow reads {', '.join(sorted(Image.OPEN))}"
            )
        try:
            clip_resample.kernel()
        except clip_resample.NoKernel as error:
            pb_utils.Logger.log_warn(f"preprocess resamples with Pillow, which takes twice as long an image: {error}")

    def execute(self, requests):
        return [self._response(request) for request in requests]

    def _response(self, request):
        try:
            images = pb_utils.get_input_tensor_by_name(request, "image_bytes").as_numpy()
            if images.ndim != 2:  # Triton takes a batch of 0, and of 2**32, for a request without a batch dimension
                message = "image_bytes: expected the shape [N, 1] with N of 1 or more, came a batch size of 0"
                return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
            images = images.reshape(-1)
            pixels = np.empty((len(images), self._side_px, self._side_px, 3), np.uint8)
            budget, refused, began_s = PixelBudget(self._max_request_pixels), [], time.process_time()
            for index, image_bytes in enumerate(images):
                faulthandler.dump_traceback_later(_LONGEST_DECODE_S, exit=True)
                try:
                    pixels[index] = self._pixels_of(image_bytes, budget=budget)
                except RefusedImage as error:
                    refused.append((index, error))
                finally:
                    faulthandler.cancel_dump_traceback_later()
            cpu_s = time.process_time() - began_s
            self._counters.add(len(images), [error.code for _, error in refused], cpu_s)
            if refused:
                message = _refusal(refused, len(images))
                return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
            return pb_utils.InferenceResponse([pb_utils.Tensor("pixels", pixels)])
        except Exception as error:
            message = f"preprocess failed: {type(error).__name__}: {error}"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INTERNAL))


def _refusal(refused, total):
    """One line that names every bad index: `[1] truncated: why; [3] empty: why`. Clients parse it.

    Where there are so many that the line would not fit, the later ones keep their index and code alone.
    """
    message = f"image_bytes: {len(refused)} of {total} images refused. "
    room = _MAX_MESSAGE_CHARS - len(message) - sum(len(f"[{i}] {error.code}; ") for i, error in refused)
    items = []
    for index, error in refused:
        reason = f": {error.reason[:300]}".encode("ascii", "replace").decode()
        room -= len(reason)
        items.append(f"[{index}] {error.code}{reason if room >= 0 else ''}")
    return message + "; ".join(items)
