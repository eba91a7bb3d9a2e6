"""From the bytes of a file to an array, and what happens to those that are no image."""
