"""Looking into a network and changing it: sites, hooks, cuts, masks of single weights, the canonical form."""
