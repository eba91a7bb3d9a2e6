"""Frozen features and what they are worth: k-NN, linear and logistic probes."""
