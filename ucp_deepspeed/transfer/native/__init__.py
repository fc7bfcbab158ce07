"""DeepSpeed's own files as an output: what a stock engine of a chosen topology loads, without this package.

Keys, types and order are those of DeepSpeed 0.19.8, ``runtime/engine.py``, ``runtime/zero/stage_1_and_2.py``,
``runtime/zero/stage3.py``, ``runtime/bf16_optimizer.py`` and ``runtime/fp16``.
"""
