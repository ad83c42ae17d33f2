"""The dialects: bodies into jobs, results and errors into answers, one file for each dialect.

Knows the engine by its `interface`; knows no queue, no worker and no socket.
"""
