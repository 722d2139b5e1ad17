"""Who owns which page: the allocator of a paged pool, and the cache of shared prefixes.

`page_allocator` hands pages to rows and takes them back; the GPU's pool calls it. `prefix_cache` is the simulated
server's: blocks of prompts named by hashes, who uses them, and which goes when pages are short.
"""
