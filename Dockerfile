# syntax=docker/dockerfile:1
# The production server: Triton with its native backends, and an entry point that builds the TensorRT plan for the GPU
# it finds. Nobody has built this image yet (README, "Not tested yet"). docs/container.md says how to run it.

# 26.08 fixed starvation in the dynamic batcher, 26.11 a use-after-free there.
ARG TRITON_TAG=26.11-py3
# To pin the image by digest, with the @: --build-arg TRITON_DIGEST=@sha256:...
ARG TRITON_DIGEST=
FROM nvcr.io/nvidia/tritonserver:${TRITON_TAG}${TRITON_DIGEST}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# The packages of preprocess and the tools, pinned with hashes.
COPY requirements/container.txt requirements/container-export.txt requirements/container-kernel.txt /opt/clip/requirements/
RUN python3 -m pip install --no-cache-dir --break-system-packages --require-hashes \
      -r /opt/clip/requirements/container.txt

# TensorRT's Python API in the version of the image: a plan loads only in the same version, down to the fourth number
# (triton-inference-server/server#5975). Empty: the version of the libnvinfer package in the image.
ARG TENSORRT_VERSION=
RUN version="${TENSORRT_VERSION:-$(dpkg-query --show --showformat='${Version}\n' 'libnvinfer[0-9]*' | head -n 1 | cut -d - -f 1)}" \
    && python3 -m pip install --no-cache-dir --break-system-packages "tensorrt==${version}"

# 1: also install what exports an open_clip model (some GB), for starts without a mounted ONNX file.
ARG WITH_EXPORT=0
RUN if [ "${WITH_EXPORT}" = 1 ]; then \
      python3 -m pip install --no-cache-dir --break-system-packages --require-hashes \
        -r /opt/clip/requirements/container-export.txt; \
    fi

COPY models /opt/clip/models
COPY tools/clip_tools /opt/clip/tools/clip_tools
COPY client/clip_embed /opt/clip/client/clip_embed

# Build the resampling library of preprocess. The compiler does not stay in the image.
RUN python3 -m pip install --no-cache-dir --target /tmp/ziglang --require-hashes \
      -r /opt/clip/requirements/container-kernel.txt \
    && PYTHONPATH=/opt/clip/tools:/tmp/ziglang python3 -m clip_tools.c_libraries \
    && rm -r /tmp/ziglang

# /onnx: the exported graphs are mounted here. /var/cache/clip-embed: the volume for files that the first start builds.
RUN install -d -o 1000 -g 1000 /onnx /var/cache/clip-embed \
    && ln -s /var/cache/clip-embed /opt/clip/.cache \
    && chmod -R u+w,a+rX /opt/clip

# CLIP_MODELS: the served model repository; the entry point writes it, `python3 -m clip_tools swap` uses it.
ENV PYTHONPATH=/opt/clip/tools:/opt/clip/client \
    CLIP_MODELS=/tmp/clip-embed-served \
    HOME=/var/cache/clip-embed

# triton-server in NVIDIA's image.
USER 1000:1000
WORKDIR /var/cache/clip-embed
VOLUME ["/var/cache/clip-embed"]
EXPOSE 8000 8001 8002

# The check embeds an image. The first start builds the plan, which takes minutes.
HEALTHCHECK --start-period=600s --interval=15s --timeout=15s --retries=3 \
  CMD ["python3", "-m", "clip_tools", "health", "--metrics-url=http://localhost:8002/metrics"]

# NVIDIA's own entry point first: it checks the driver and sets up CUDA's forward compatibility.
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "python3", "-m", "clip_tools.container.entrypoint"]
