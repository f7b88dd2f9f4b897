"""Jobs: commands that run on this host, from the request to the outputs (spec J-30 to J-63)."""
