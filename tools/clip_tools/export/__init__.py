"""The ONNX graph of an open_clip model: exported and compared with PyTorch, rewritten, cut into parts, and run."""
