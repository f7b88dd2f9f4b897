"""The deltasync-server commands: parse, call one function, print."""
