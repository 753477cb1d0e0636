"""LAVIS's tasks as runner_aurora trains and evaluates them."""
