"""Training and fine-tuning: settings, the loop, checkpoints, the processes of one training."""
