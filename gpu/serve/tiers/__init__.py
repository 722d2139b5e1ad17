"""Prompts' KV in host memory and on disks, for gpu.serve.

`prompt_tiers` loads what tiers hold of a prompt when its request is admitted, as pkvsim.serving.live's scheduler asks
for it, and stores prompts that have been computed; `open_tiers` puts the tiers behind a model's pages.
"""
