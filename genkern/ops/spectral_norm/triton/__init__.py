"""Spectral normalization of a list of weights in Triton: at most 2·iterations + 1 launches forward
and 2 backward, however many layers the list has."""
