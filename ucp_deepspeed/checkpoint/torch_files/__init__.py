"""Files of ``torch.save``, read without running code: archives, pickles, and where each tensor's bytes lie."""
