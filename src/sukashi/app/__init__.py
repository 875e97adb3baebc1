"""The local site: the experiments in a folder, their pages, and what people choose on them."""
