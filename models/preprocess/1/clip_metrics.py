"""The counters that `preprocess` adds to Triton's own in /metrics."""

import time

# Each increment is a message to the server, which takes 0.05 ms on two busy cores; a photograph of 640x480 takes 2 ms.
# So counts are sent at this interval, and refusals at once.
_SEND_EVERY_S = 1.0

CODES = (
    "empty",
    "too_large",
    "too_many_pixels",
    "too_complex",
    "too_deep",
    "unsupported_format",
    "not_an_image",
    "truncated",
    "corrupt",
)
"""The codes of `RefusedImage`. Each has a counter from the start, so that Prometheus sees its first refusal."""


class Counters:
    """The counters of this process. Triton adds up those of all `preprocess` processes by name and labels.

    The images and CPU time of a process's last second are sent with its next request.
    """

    def __init__(self, pb_utils):
        def family(name, description):
            return pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.COUNTER)

        # Keep the references: a family ends with its last one.
        self._families = (
            family("clip_images", "Received images, including refused ones"),
            family("clip_decode_cpu_seconds", "CPU time of decoding and resizing, including refused images"),
            family("clip_refused_images", "Refused images, by the code in their error"),
        )
        self._counters = [counter.Metric(labels={}) for counter in self._families[:2]]
        self._refused = {code: self._refused_of(code) for code in CODES}
        self._images, self._cpu_s, self._sent_s = 0, 0.0, 0.0

    def _refused_of(self, code):
        return self._families[2].Metric(labels={"code": code})

    def add(self, images, refused_codes, cpu_s):
        """Count one request: all its images, the codes of the refused ones, and its CPU time."""
        self._images, self._cpu_s, now_s = self._images + images, self._cpu_s + cpu_s, time.monotonic()
        for code in refused_codes:
            if code not in self._refused:
                self._refused[code] = self._refused_of(code)
            self._refused[code].increment(1)
        if refused_codes or now_s - self._sent_s >= _SEND_EVERY_S:
            for counter, count in zip(self._counters, (self._images, self._cpu_s), strict=True):
                counter.increment(count)
            self._images, self._cpu_s, self._sent_s = 0, 0.0, now_s
