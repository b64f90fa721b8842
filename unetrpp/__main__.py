"""`python -m unetrpp` is the command `unetrpp`."""

from unetrpp.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
