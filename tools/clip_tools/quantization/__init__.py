"""Exports the graph in a lower precision. INT8 and FP8 need calibration and Q/DQ pairs, INT8 also a rotation."""
