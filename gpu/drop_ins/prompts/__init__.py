"""Prompts whose beginnings are in the pool, for the drop-ins whose pages are filled by a model.

`prompt_keys` names blocks of tokens, and the model that computed them; `prompt_pool` loads what is known of a batch's
prompts into its pages and stores what was computed.
"""
