"""A checkpoint's tensors: the files, their names, and the way into a model."""
