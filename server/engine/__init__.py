"""What turns jobs into vectors: the queue, the batcher, and the worker processes.

`interface` is all that others need of it. Knows no wire type, no envelope and no HTTP.
"""
