"""The exported graph in eight bits, INT8 or FP8: calibration, rotation, rounded weights, Q/DQ pairs."""
