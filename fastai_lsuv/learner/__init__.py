"""What needs a fastai `Learner`: its first batch, how it calls the model, and what must not be touched."""
