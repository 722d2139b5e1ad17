"""Prompts whose beginnings are in the pool, for whoever computes them: Transformers' cache, gpu.serve.

`block_keys` names blocks of tokens, and the model that computed them; `prompt_pool` puts tiers behind the pages of a
model's layers, loads what is known of a prompt and stores what was computed.
"""
