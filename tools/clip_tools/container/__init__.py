"""The container: builds what is missing at startup, then runs tritonserver."""
