"""What the container does at its first start, before it becomes tritonserver."""
