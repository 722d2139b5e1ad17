"""Servers with a part of the work each: prompts on some, decoding on others.

Read `stages`: serve is what studies call; it runs the prefill servers for the first tokens, sends what they cached over
a link, runs the decode servers on what arrives, and joins both into one result.
"""
