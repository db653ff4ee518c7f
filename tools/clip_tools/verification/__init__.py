"""Whether an engine's embeddings equal open_clip's: the reference, the sample, the limits and the verdict."""
