"""Tokenizers: what they say of themselves on disk, and how many of their codes are in use."""
