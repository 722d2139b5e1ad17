"""One disk of a pool: blocks in slots of preallocated files, written and read without the page cache.

Read in this order: `disk_tier` keeps one disk busy with `disk_jobs` (its thread, queue, ring and hand-over), and
`disk_requests` says which of its requests have failed or stalled, and tells of it; both over `disk_files` (slots,
headers, what a restart finds) and `disk_reads` (many reads at once; `open_reader` chooses threads or `io_uring`, and
`nvme_passthrough` is there to be asked for). `use_order` keeps over a restart which blocks were used last, and
`host_flush` writes what host memory holds before a pool closes. `disk_stats` is what callers of the cache are told of a
disk. Nothing here needs a GPU.
"""
