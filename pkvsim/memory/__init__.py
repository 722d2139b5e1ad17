"""Who owns which page: the allocator of a paged pool, and the cache of shared prefixes."""
