"""NV-Embed, the model: checkpoint, tokenizer, packed forward, offline encoder.

Knows nothing of HTTP, asyncio, queues or clients. Imports point down the list in
tests/test_layering.py; importing this package imports neither torch nor transformers.
"""
