"""`python -m scalecv` is `scalecv`."""

from scalecv.cli.main import main

if __name__ == "__main__":
    main()
