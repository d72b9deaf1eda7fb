"""From a user's text to token blocks: reading, splitting, tokenising. It never leaves this process.

`docs/data.md` shows every format and layout. Which files there are: `listing`; what is in one: `rows`; what a
row means: `records`; whose it is: `sources`; what is held out: `split`; tokens: `tokens` and `chat`.
"""

from soppu.data.digests import source_digest
from soppu.data.examples import HELD_OUT_ONE_IN, Example
from soppu.data.listing import STDLIB, STDLIB_PUBLIC
from soppu.data.split import UserData, list_users, load_public, load_user, split_public
from soppu.data.tokens import IGNORE, Block, collate, tokenize

__all__ = [
    "HELD_OUT_ONE_IN",
    "IGNORE",
    "STDLIB",
    "STDLIB_PUBLIC",
    "Block",
    "Example",
    "UserData",
    "collate",
    "list_users",
    "load_public",
    "load_user",
    "source_digest",
    "split_public",
    "tokenize",
]
