"""`python -m pretrain PRESET key=value ...` is `selfsight pretrain`."""

import sys

from launch.cli import main

if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])
