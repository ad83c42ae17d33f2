"""Linear layers beside torch's own: in 8 bits, or with weights laid out for a CPU."""
