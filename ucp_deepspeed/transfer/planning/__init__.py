"""Load plans: pair a checkpoint with a model, and plan what each rank of a target reads. Nothing here reads a tensor."""
