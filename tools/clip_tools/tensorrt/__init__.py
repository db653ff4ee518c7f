"""TensorRT plans: built from the exported graph, described by a manifest, run on this machine's GPU."""
