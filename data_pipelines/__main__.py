"""`python -m data_pipelines pack|verify|demo-data ...` is `selfsight pack|verify|demo-data ...`."""

import sys

from launch.cli import main

if __name__ == "__main__":
    main(sys.argv[1:] or ["--help"])
