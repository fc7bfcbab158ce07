"""The universal format: an index, and a file or several with whole parameters and states."""
