"""Asking a model the questions of a benchmark and scoring what it answers."""
