"""Sparse autoencoders of a layer: are its parts given back as well, and do they say as much?"""
