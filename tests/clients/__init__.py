"""What clients of other makers send, and what they make of the answers."""
