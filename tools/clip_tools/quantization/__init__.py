"""The exported graph in a lower precision. INT8 and FP8 need calibration, a rotation and Q/DQ pairs."""
