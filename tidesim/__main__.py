"""`python -m tidesim`: the same as the command `tidesim`."""

from tidesim.cli import main

if __name__ == "__main__":
    main()
