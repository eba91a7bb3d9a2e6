"""Decoding in C, where it was built."""
