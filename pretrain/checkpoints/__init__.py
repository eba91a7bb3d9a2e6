"""Checkpoints: whole or not there, written while training goes on, read on any number of ranks and any ZeRO stage."""
