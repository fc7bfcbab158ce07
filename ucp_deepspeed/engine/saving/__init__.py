"""The save hook: DeepSpeed's own files, the manifest beside them, and saves in the background."""
