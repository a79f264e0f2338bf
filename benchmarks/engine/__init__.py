"""The torch engine beside its peers: `python -m benchmarks.engine`."""
