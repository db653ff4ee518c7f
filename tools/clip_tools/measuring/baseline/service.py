"""POST /embed/base64: `{"images": ["<base64>", ...]}` -> `{"embeddings": [[...], ...], "count": N, "model_info": ...}`.

/embed/batch takes the same images as `files` of a form, and /model-info says which model it is.
It is a typical service, as fast as one process can be: open_clip's own transform and model on
the GPU or, without one, with PyTorch's threads on every core; `torch.inference_mode`; FastAPI's thread pool so that one
request is decoded while another computes; and one request computing at a time, for two would share the same cores. A
request is one batch; nothing batches across requests.
"""

import base64
import binascii
import io
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from clip_tools.errors import needs_extra
from clip_tools.oracle import Weights, best_device, load_oracle

if TYPE_CHECKING:
    from fastapi import FastAPI

MAX_IMAGES = 64  # as models/clip_ensemble takes


@dataclass(frozen=True)
class BaselineOptions:
    """Which weights to serve, in which precision, and where."""

    weights: Weights
    precision: Literal["fp32", "fp16"] = "fp32"
    host: str = "127.0.0.1"
    port: int = 8010


def create_app(weights: Weights, precision: Literal["fp32", "fp16"] = "fp32") -> "FastAPI":
    """The service, its model loaded and one image embedded. Raises ToolError for a missing package."""
    with needs_extra("baseline"):
        import open_clip
        import torch
        from fastapi import Body, FastAPI, HTTPException, UploadFile
        from PIL import Image
    oracle = load_oracle(weights, device=best_device(), precision=precision)
    computing = threading.Lock()
    app = FastAPI(title="open_clip in PyTorch", docs_url=None, redoc_url=None, openapi_url=None)
    device = "GPU" if oracle.device == "cuda" else "CPU"
    size = open_clip.get_model_config(weights.model)["embed_dim"]
    info = {"model_name": weights.model, "pretrained": weights.pretrained, "embedding_dim": size}
    info |= {"device": device, "precision": precision}

    def embed(images: list[bytes]) -> dict[str, Any]:
        if not 1 <= len(images) <= MAX_IMAGES:
            raise HTTPException(400, f"expected 1 to {MAX_IMAGES} images, came {len(images)}")
        refused, tensors = [], []
        for index, image in enumerate(images):
            try:
                tensors.append(oracle.transform(Image.open(io.BytesIO(image))))
            except Exception as error:
                refused.append(f"[{index}] not_an_image: {type(error).__name__}")
        if refused:
            reason = f"image_bytes: {len(refused)} of {len(images)} images refused. {'; '.join(refused)}"
            raise HTTPException(400, reason)
        batch = torch.stack(tensors)
        with computing:
            embeddings = oracle.encode(batch).tolist()
        return {"embeddings": embeddings, "count": len(embeddings), "model_info": info}

    def embed_base64(images: Annotated[list[str], Body(embed=True)]) -> dict[str, Any]:
        try:
            contents = [base64.b64decode(image, validate=True) for image in images]
        except binascii.Error as error:
            raise HTTPException(400, f"images: expected base64: {error}") from error
        return embed(contents)

    def embed_batch(files: list[UploadFile]) -> dict[str, Any]:
        return embed([file.file.read() for file in files])

    def model_info() -> dict[str, Any]:
        return info

    def health() -> dict[str, str]:
        return {"status": "ready", "device": device, "precision": precision}

    async def errors_as_triton_writes_them(_request: Any, error: Any) -> Any:
        from fastapi.responses import JSONResponse

        return JSONResponse({"error": str(error.detail)}, error.status_code)

    app.add_api_route("/embed/base64", embed_base64, methods=["POST"])
    app.add_api_route("/embed/batch", embed_batch, methods=["POST"])
    app.add_api_route("/model-info", model_info, methods=["GET"])
    app.add_api_route("/health", health, methods=["GET"])
    app.add_exception_handler(HTTPException, errors_as_triton_writes_them)
    with computing:
        oracle.encode(torch.zeros(1, 3, 224, 224))
    return app


def serve(options: BaselineOptions) -> None:
    """Serve in the foreground until a signal comes."""
    with needs_extra("baseline"):
        import uvicorn
    app = create_app(options.weights, options.precision)
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning", workers=1)
