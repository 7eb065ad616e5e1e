"""`python -m cenote`: the program, where its folder is not on the PATH."""

from cenote.cli import main

if __name__ == "__main__":
    main()
