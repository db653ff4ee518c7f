"""`python -m clip_tools`: the command `clip-tools` where the package is on the path but not installed."""

from clip_tools.cli import main

if __name__ == "__main__":
    main()
