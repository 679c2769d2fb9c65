"""Entry point of `python -m parcelray.cli`."""

from parcelray.cli import main

main()
