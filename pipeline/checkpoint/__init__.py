"""Checkpoints that any strategy and any number of ranks can write and read: flat pieces, hashed, committed last."""
