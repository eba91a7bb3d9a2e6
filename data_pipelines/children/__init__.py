"""Batches made by processes of their own, into memory that they share with the loader's."""
