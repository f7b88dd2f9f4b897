"""The benchmark against rsync, the demo and the replay of the reference bundles; none of it is installed."""
