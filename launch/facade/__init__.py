"""Selfsight in Python."""
