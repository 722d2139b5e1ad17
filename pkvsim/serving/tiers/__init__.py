"""KV beyond the GPU's pages in the serving loop.

At its admission a request asks the pool (pkvsim.memory) for the blocks of its prompt that HBM does not hold;
pkvsim.serving.tier_gate is what the compiled loop knows of that. `tier_server` answers, stores prompts as they have
been computed, and keeps what `tier_result` reports. `prompt_prices` says what loading spares, `start` sets all of it
up.
"""
