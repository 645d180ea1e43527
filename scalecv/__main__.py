"""`python -m scalecv` is `scalecv`."""

from scalecv.cli import main

if __name__ == "__main__":
    main()
