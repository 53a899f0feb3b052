"""What is recorded of a training, and how it is read."""
