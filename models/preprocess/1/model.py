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

# If a decoder hangs for this long, its process logs its stack and exits, and the supervisor restarts the server. The
# slowest file within the limits takes some seconds.
_LONGEST_DECODE_S = 60

# Decoding runs at a lower priority than inference: work decoded for a request that is then rejected is wasted. Images
# per CPU second at ten times the load that two cores can serve, in two runs each: 14.6 and 15.6 without this, 15.2 and
# 18.6 with it. At a load that they can serve: 20.5.
_NICENESS = 10


class TritonPythonModel:
    """Decodes each request separately: a bad image fails only its own request."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        value = {key: parameter["string_value"] for key, parameter in config["parameters"].items()}
        value["side_px"] = self._side_px = int(config["output"][0]["dims"][0])
        self._batches = None  # set in mode gpu
        try:
            if value["mode"] == "gpu":
                from clip_gpu import open_batches

                self._batches = open_batches(value, int(args["model_instance_device_id"]))
            self._pixels_of = self._batches.on_cpu if self._batches else open_pixels(value)
            self._max_request_pixels = int(value["max_request_pixels"])
        except ValueError as error:
            raise pb_utils.TritonModelException(f"preprocess: {error}") from None
        self._counters = Counters(pb_utils)
        os.nice(_NICENESS)
        AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # more instances use more cores, not more threads
        Image.init()
        formats = set(value["formats"].split())
        if clip_heif.NAME in formats and (why := clip_heif.missing_opener()):
            pb_utils.Logger.log_warn(f"preprocess does not accept HEIC and HEIF: {why}")
            formats.remove(clip_heif.NAME)
        if unknown := formats - set(Image.OPEN):
            raise pb_utils.TritonModelException(
                f"preprocess: parameter formats has {', '.join(sorted(unknown))}; "
                f"this Pillow reads {', '.join(sorted(Image.OPEN))}"
            )
        try:
            clip_resample.kernel()
        except clip_resample.NoKernel as error:
            pb_utils.Logger.log_warn(f"preprocess resamples with Pillow, which takes twice as long: {error}")

    def execute(self, requests):
        if self._batches:
            return self._responses_by_gpu(requests)
        return [self._response(request) for request in requests]

    def _response(self, request):
        try:
            if (images := _images_of(request)) is None:
                return _no_batch()
            pixels = np.empty((len(images), self._side_px, self._side_px, 3), np.uint8)
            budget, refused, began_s = PixelBudget(self._max_request_pixels), [], time.process_time()
            for index, image_bytes in enumerate(images):
                try:
                    pixels[index] = self._on_cpu(image_bytes, budget)
                except RefusedImage as error:
                    refused.append((index, error))
            cpu_s = time.process_time() - began_s
            self._counters.add(len(images), [error.code for _, error in refused], cpu_s)
            if refused:
                return _refused(refused, len(images))
            return pb_utils.InferenceResponse([pb_utils.Tensor("pixels", pixels)])
        except Exception as error:
            return _failed(error)

    def _on_cpu(self, image_bytes, budget):
        _watch()
        try:
            return self._pixels_of(image_bytes, budget=budget)
        finally:
            if self._batches:
                _watch()  # restart the timer, as the GPU goes on with the others
            else:
                faulthandler.cancel_dump_traceback_later()

    def _responses_by_gpu(self, requests):
        """Like `_response`, but for all requests at once; the pixels stay on the GPU."""
        began_s = time.process_time()
        _watch()
        try:
            asked = [_images_of(request) for request in requests]
            budgets = [PixelBudget(self._max_request_pixels) for _ in asked]
            together = [
                (one, left)
                for images, left in zip(asked, budgets, strict=True)
                for one in (() if images is None else images)
            ]
            batch = self._batches(together, self._on_cpu)
        except Exception as error:
            return [_failed(error) for _ in requests]
        finally:
            faulthandler.cancel_dump_traceback_later()
        image_cpu_s = (time.process_time() - began_s) / max(1, len(together))
        responses, start = [], 0
        for images in asked:
            if images is None:
                responses.append(_no_batch())
                continue
            count = len(images)
            wrong = [(slot - start, error) for slot, error in sorted(batch.failed.items()) if 0 <= slot - start < count]
            refused = [(index, error) for index, error in wrong if isinstance(error, RefusedImage)]
            self._counters.add(count, [error.code for _, error in refused], count * image_cpu_s)
            if len(refused) < len(wrong):
                responses.append(_failed(next(error for _, error in wrong if not isinstance(error, RefusedImage))))
            elif refused:
                responses.append(_refused(refused, count))
            else:
                pixels = pb_utils.Tensor.from_dlpack("pixels", self._batches.lent(batch, start, count))
                responses.append(pb_utils.InferenceResponse([pixels]))
            start += count
        return responses


def _watch():
    """Start the timer anew that ends this process if a decoder hangs: see `_LONGEST_DECODE_S`."""
    faulthandler.dump_traceback_later(_LONGEST_DECODE_S, exit=True)


def _images_of(request):
    """The encoded images; None for a batch of 0 or 2**32, whose batch dimension Triton drops."""
    images = pb_utils.get_input_tensor_by_name(request, "image_bytes").as_numpy()
    return images.reshape(-1) if images.ndim == 2 else None


def _no_batch():
    message = "image_bytes: expected the shape [N, 1] with N of 1 or more, got a batch size of 0"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))


def _refused(refused, total):
    error = pb_utils.TritonError(_refusal(refused, total), pb_utils.TritonError.INVALID_ARG)
    return pb_utils.InferenceResponse(error=error)


def _failed(error):
    message = f"preprocess failed: {type(error).__name__}: {error}"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INTERNAL))


def _refusal(refused, total):
    """One line that names every bad index: `[1] truncated: why; [3] empty: why`. Clients parse it.

    If the line would get too long, later items have only their index and code.
    """
    message = f"image_bytes: {len(refused)} of {total} images refused. "
    room = _MAX_MESSAGE_CHARS - len(message) - sum(len(f"[{i}] {error.code}; ") for i, error in refused)
    items = []
    for index, error in refused:
        reason = f": {error.reason[:300]}".encode("ascii", "replace").decode()
        room -= len(reason)
        items.append(f"[{index}] {error.code}{reason if room >= 0 else ''}")
    return message + "; ".join(items)
