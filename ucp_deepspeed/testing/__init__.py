"""The tools for tests of distributed checkpoints: real ranks on one CPU machine, tiny real models, Megatron-Core without CUDA."""
