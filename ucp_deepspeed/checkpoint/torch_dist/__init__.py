"""Folders of Megatron-Core's ``torch_dist`` distributed checkpoints: a DCP folder with keys of its own, and ``common.pt``."""
