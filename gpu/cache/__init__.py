"""A paged KV pool, and the writer that appends to its pages.

`pool` allocates rows and keeps their tables on the GPU, and `head_pool` is one whose pages hold one KV head, so that
each head can give up pages of its own; `writer` puts new tokens into pages in one launch, rotated and quantised on the
way; `append_checks` and `append_variant` are its checks and its kernel's side, and need no GPU. `tiers` keeps blocks of
KV in host memory and on disks, `dma` copies them by the GPU's copy engines, and `prompts` knows them by what they hold.
"""
