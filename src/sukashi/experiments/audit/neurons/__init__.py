"""Single units of layers: do those that matter most tell classes apart as well, and does as much hang on them?"""
