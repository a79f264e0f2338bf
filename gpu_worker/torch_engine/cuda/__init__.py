"""What the engine does otherwise on a GPU: attention in place over paged keys and values, replayed decode steps."""
