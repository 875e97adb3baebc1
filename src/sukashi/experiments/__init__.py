"""Experiments: from names of models and data to folders of results with a page."""
