"""Spectral normalization of a list of weights."""
