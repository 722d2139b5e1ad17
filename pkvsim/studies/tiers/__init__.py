"""Studies of pages beyond the GPU.

`axes` reads what a sweep varies of tiers, `notes` says what a report assumes of them, and `decode_on_tiers` prices
decode whose pages are selected on a tier (LeoAM) or attended to there (InstInfer).
"""
