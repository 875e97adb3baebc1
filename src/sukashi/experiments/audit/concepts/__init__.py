"""Concepts of crops (CRAFT): do cut networks see the same parts in images of a class, and as plainly?"""
