"""What drives training: DeepSpeed and DDP engines, checkpoints, run directory, metrics."""
