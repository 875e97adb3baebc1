"""Subspaces of what a layer holds: found, and shown by the images that they respond to."""
