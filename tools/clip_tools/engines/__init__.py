"""From an open_clip model to an engine that is what it says: export, lower, build, verify."""
