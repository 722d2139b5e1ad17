"""Page selection on a real model: `llama` runs it, `texts` are what it reads, `choosers` say which pages a step reads,
`evictions` which tokens are kept, and `judge` compares next-token distributions and answers.
"""
