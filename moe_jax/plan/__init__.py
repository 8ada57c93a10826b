"""What a training step costs on a TPU slice, from a machine that has none."""
