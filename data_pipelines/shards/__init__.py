"""Tar shards and their indexes: any sample by its number."""
