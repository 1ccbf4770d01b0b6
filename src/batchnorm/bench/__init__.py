"""Our layer beside other libraries: the same work, in one run, in turns, with the answers compared."""
