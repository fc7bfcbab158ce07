"""The DeepSpeed side: what an engine holds, and the hooks on its saving and loading.

All access to DeepSpeed's private attributes is in this package: per optimizer class in `optimizers`, the rest in `model`.
"""
