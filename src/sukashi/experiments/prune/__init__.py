"""One network, cut or made sparse."""
