"""What a training step will take on machines that are not there: compiled, counted and estimated."""
