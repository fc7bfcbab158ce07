"""Evidence for and against a spec; ``ucp spec`` checks and makes specs by it."""
