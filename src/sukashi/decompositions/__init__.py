"""Decompositions: directions in what a network holds at a place, found without labels, looked at, taken out."""
