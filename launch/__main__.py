"""`python -m launch` is `selfsight`."""

from launch.cli import main

if __name__ == "__main__":
    main()
