"""The loop, and what it keeps: roles, optimizers, checkpoints, averages, sharded weights."""
