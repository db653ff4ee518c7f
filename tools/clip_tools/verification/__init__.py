"""What embeddings are compared with: open_clip's of photographs and texts, the sample of an export, the limits."""
