"""Lets `python -m deltasync_server` be the program."""

from deltasync_server.cli.main import main

if __name__ == "__main__":
    main()
