"""The socket: connections and their limits, the layers around every request, a server's life.

Wires the dialects to an engine; knows nothing of what is asked for and answered.
"""
