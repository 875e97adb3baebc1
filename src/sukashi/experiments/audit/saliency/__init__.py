"""Saliency maps: are those of cut networks as sparse and as faithful as the reference's, and the same?"""
