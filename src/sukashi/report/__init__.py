"""Pages, figures and words."""
