"""The embedded server: starts, probes, swaps and stops the real tritonserver."""
