"""Study files: several experiments, one page about all of them."""
