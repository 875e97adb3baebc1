"""Networks pruned and trained level by level."""
