"""`python -m fastai_lsuv`: the demo, on one thread unless `OMP_NUM_THREADS` asks for more."""

import os

import torch

from fastai_lsuv.demo import main

if __name__ == "__main__":
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # so small a network is slower on two
    main()
