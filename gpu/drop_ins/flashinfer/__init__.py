"""FlashInfer's decode wrappers over our engine: a script changes its import and nothing else.

`wrapper` is BatchDecodeWithPagedKVCacheWrapper, `cascade` MultiLevelCascadeAttentionWrapper of two levels. `arguments`
brings what FlashInfer lets its arguments be to one form, `buffers` keeps a step's page tables on the GPU.
"""
