"""The training engine: DeepSpeed and DDP engines, checkpoints, run directory, metrics."""
