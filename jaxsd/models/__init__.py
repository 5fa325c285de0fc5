"""The networks, as plain functions over dicts of arrays named as in the checkpoints."""
