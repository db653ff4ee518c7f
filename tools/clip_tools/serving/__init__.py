"""The embedded server: the real tritonserver, started, asked, swapped and stopped."""
