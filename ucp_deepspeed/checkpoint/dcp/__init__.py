"""Folders of ``torch.distributed.checkpoint`` (DCP): ``.metadata``, and chunks of tensors in ``*.distcp`` files."""
