"""What a row of the table of clients says, and what the rows share.

A row is held in both directions: a client that shows less fails, and so does one that shows more,
that the row may say so.
"""

from __future__ import annotations

from dataclasses import dataclass

ALL_TOLD = ("model", "long", "key")
MISTAKES = {
    "model": "does not exist; this server has",
    "long": "maximum context length is 2048 tokens",
    "key": "Incorrect API key",
}
"""The first mistakes of a client's users -> the words of ours that have to reach them."""
SERVERS: dict[str, tuple[str, ...]] = {
    "keys": ("--api-key-file", "KEYS"),
    "open": (),  # for clients that cannot send a key
    "ada": ("--api-key-file", "KEYS", "--served-model-name", "text-embedding-ada-002"),
    "cohere": ("--api-key-file", "KEYS", "--served-model-name", "embed-english-v3.0"),
    "cl100k": ("--api-key-file", "KEYS", "--token-ids", "cl100k"),
}


@dataclass(frozen=True, slots=True)
class Client:
    """One client and one way to set it up.

    side: how its users get a query's vector: "Q" its own method or field says it, "q" the model's
    name with `-query`, "u" a base URL with `/query`, "-" not at all. silent: its own method for
    questions gives the passage's vector, without an error. told: the mistakes of which our own
    words reach the user. refused: it cannot work so, and these words reach its user.
    ranks: it asks for scores, not for vectors. not_yet: what it waits for; it is expected to fail
    until then.
    """

    name: str
    package: str
    module: str
    adapter: str
    argument: str = ""
    side: str = "q"
    silent: bool = False
    told: tuple[str, ...] = ALL_TOLD
    refused: str = ""
    not_yet: str = ""
    server: str = "keys"
    ranks: bool = False
    note: str = ""


NO_KEY = ("model", "long")
CUTS = ("model", "key")
"""A protocol whose default is to cut what is too long; then nobody is told."""
NO_MODEL = ("long", "key")
