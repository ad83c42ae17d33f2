"""Attention inside each sequence of a batch: one function in front, several kernels behind."""
