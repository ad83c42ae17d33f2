"""The NV-Embed server: the HTTP edge, the micro-batcher and the engine workers.

`server` imports `model`, never the reverse. The front process never imports torch: only
`server.engine.worker`'s child process does.
"""
