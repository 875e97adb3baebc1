"""Preflights: what a model and data would give, before anything is done."""
