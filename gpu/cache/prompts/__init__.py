"""Prompts whose beginnings are in the pool, for whoever computes them: Transformers' cache, gpu.serve.

pkvsim.memory.blocks.block_keys names blocks by their tokens, `fingerprint` the model that computed them; `prompt_pool`
puts tiers behind the pages of a model's layers, loads what is known of a prompt and stores what was computed.
"""
