"""The one training loop and the one evaluation, and what they need: schedule, augmentation, checkpoints, processes."""
