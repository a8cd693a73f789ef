"""How good a checkpoint is: evaluate one, compare several."""
