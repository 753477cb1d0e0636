"""LAVIS's tasks as runner_aurora trains and evaluates them: the loss of a batch, the metrics of a split.
They lie below the runner and its loop, which call them."""
