"""Requests that come while others run: what a real server drives, in place of a trace that is known beforehand.

`live_scheduler` takes requests in and says what each step runs (`live_step`, which also has what it asks of KV beyond
the pages), over arrays that grow (`growing`) and blocks that get numbers (`block_numbers`); `shared_blocks` knows what
waits for loads of others, and `page_book` says which pages of the pool hold it. The decisions are those of
pkvsim.serving.scheduling, which the simulator makes too.
"""
