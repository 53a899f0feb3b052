"""Notebooks that train on Fashion-MNIST are run where its images are."""

from pathlib import Path

from fastai_lsuv.data import DEBIAN

ON_FASHION_MNIST = ["05_does_it_help.ipynb", "06_course.ipynb"]
collect_ignore = [] if DEBIAN.exists() or Path("data/FashionMNIST").exists() else ON_FASHION_MNIST
