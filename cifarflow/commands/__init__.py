"""The commands of `cifarflow`, one a module: its flags, and what it does with them."""
