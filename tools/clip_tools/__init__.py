"""Builds, checks, serves and measures the model repository: the command `clip-tools`."""
