"""The ONNX graph of an open_clip model: exported, compared with PyTorch, and rewritten in a lower precision."""
