"""Functional model builders, one family a module."""
