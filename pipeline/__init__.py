"""Shards in, trained model out. May import `data_tools.manifest` and `data_tools.errors`, never `launch`."""
