"""This package as a model of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval).

`requests` needs nothing of it; `models` and `registration` are imported by it alone; `command` runs its command line.
"""
