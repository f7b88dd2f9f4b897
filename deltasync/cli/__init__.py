"""The deltasync commands: parse, call one function, print."""
