"""The runner and what a run consists of: order of the samples, steps of an epoch, checkpoints, resuming, stopping.
It knows tasks, data and adapters, and asks a model only for what the protocol ``TrainableModel`` names."""
