"""Pretraining and instruction-finetuning of large language models on many GPUs.

Rooms in reading order, each knowing only those before it: config, tokenizer, data, model, hf, parallel, optim,
checkpoint, training.
"""
