"""One network as a file that runs without sukashi."""
