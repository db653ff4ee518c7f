"""The service that `clip-tools bench` compares with: open_clip in PyTorch behind FastAPI, without Triton."""
