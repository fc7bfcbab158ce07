"""DeepSpeed's own checkpoints, as saved by any optimizer, stage and kind of parallelism, with the manifest beside them."""
