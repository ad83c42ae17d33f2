"""How each client is asked, in its own environment: nothing here imports the product.

A module is the clients of one environment. Each function takes `At` (where, with which key, which
model) and gives `Ways`: how this client embeds passages, and how a question.
"""
