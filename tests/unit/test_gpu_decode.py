"""`clip_gpu_decode` where the GPU fails."""

import io
import sys
from types import SimpleNamespace

from PIL import Image

from clip_gpu_decode import open_decoder
from clip_preprocess import pixels_of


def test_what_a_gpu_fails_at_pillow_decodes(limits, monkeypatch, capsys):
    def fail(*_args, **_options):
        raise RuntimeError("CUDA error: an illegal memory access")

    package = SimpleNamespace(
        Decoder=lambda **_: SimpleNamespace(decode=fail),
        DecodeParams=lambda **_: None,
        ColorSpec=SimpleNamespace(SRGB=0),
    )
    monkeypatch.setitem(sys.modules, "nvidia", SimpleNamespace(nvimgcodec=package))
    jpeg = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(jpeg, "JPEG")
    pixels = pixels_of(jpeg.getvalue(), limits, decode=open_decoder())
    assert (pixels == pixels_of(jpeg.getvalue(), limits)).all()
    assert "illegal memory access" in capsys.readouterr().err
