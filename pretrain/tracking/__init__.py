"""What a run writes down: metrics and pictures as files, and the same in wandb."""
