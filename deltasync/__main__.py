"""Lets `python -m deltasync` run the program."""

from deltasync.cli.main import main

main()
