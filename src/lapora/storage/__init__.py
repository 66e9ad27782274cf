"""A posterior on disk: manifest, tensors, partial sums of an interrupted fit, file operations."""
