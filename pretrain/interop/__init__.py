"""Encoders from and to the formats that others use."""
