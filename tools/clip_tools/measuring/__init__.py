"""Measures exactness and speed, where the time goes, and which configuration is best."""
