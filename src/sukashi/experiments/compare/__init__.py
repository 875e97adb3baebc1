"""Comparisons of criteria over ratios and seeds."""
