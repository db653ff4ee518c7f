"""What embeddings are compared with: open_clip's embeddings of photographs and texts, and the limits."""
