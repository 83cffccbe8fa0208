"""Whole checkpoints in and out: public folders to runs of ours and back, and what is in either."""
