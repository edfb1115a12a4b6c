"""The two players: a language model that writes, and a scorer that reads."""
