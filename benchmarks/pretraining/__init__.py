"""Small pretraining runs from which every claim about mixing is checked; see `__main__` for the commands."""
