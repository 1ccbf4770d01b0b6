"""The claims about batch normalization as experiments: one file an experiment, one row in `experiments.EXPERIMENTS`."""
