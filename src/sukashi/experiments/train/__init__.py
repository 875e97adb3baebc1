"""Networks trained and fine-tuned."""
