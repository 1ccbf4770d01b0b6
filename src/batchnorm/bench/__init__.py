"""Ours beside the others: the same work, in one run, interleaved, with the answers compared."""
