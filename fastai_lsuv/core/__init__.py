"""The algorithm, on PyTorch alone: it knows nothing of fastai."""
