"""`nv-embed encode`: files of texts into files of vectors, without a server.

Shares with the dialects how fields become prefixes, and with the engine how inputs become ids.
"""
