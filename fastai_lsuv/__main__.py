"""`python -m fastai_lsuv`: the demo."""

from fastai_lsuv.demo import main

if __name__ == "__main__":
    main()
