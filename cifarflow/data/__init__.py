"""Data sets, decoders and input pipelines."""
