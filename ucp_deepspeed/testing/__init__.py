"""What tests of distributed checkpoints need: real ranks on one CPU machine, tiny real models, Megatron-Core without CUDA."""
