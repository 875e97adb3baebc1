"""Circuits: is the part of a network that tells one class from the others smaller, and is it as good?"""
