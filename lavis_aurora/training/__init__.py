"""What a training run needs besides the model: order of the samples, steps, checkpoints, stopping and resuming."""
