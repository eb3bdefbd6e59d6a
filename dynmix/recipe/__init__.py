"""Recipes: a YAML file that describes a run. They build objects of the library and call them, and decide nothing."""
