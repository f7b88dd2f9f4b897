"""The sending wing: observe a folder, seal deltas, push them to a server."""
