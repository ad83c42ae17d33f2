"""What this machine lets a model do: cores, memory, GPUs, and which product is right and fast."""
