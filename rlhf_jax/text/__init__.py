"""Strings to token ids and back: tokenizers, rewards, the built-in language."""
