"""Recipes: what decides a training run, the named ones, and the run of one."""
