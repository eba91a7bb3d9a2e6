"""`python -m eval` is `selfsight probe`."""

import sys

from launch.cli import app

if __name__ == "__main__":
    app(["probe", *sys.argv[1:]])
