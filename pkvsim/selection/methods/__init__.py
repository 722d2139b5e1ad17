"""Methods of page selection and eviction, one file each: what it scores, aggregates, pins and budgets, and its paper.

Those that choose what a step reads score summaries of pages (`mean_std`, `centroids`, `quest`, `sentencekv`, `louiskv`)
or reuse exact masses (`kascade`, `twilight`). Those that evict score tokens by the attention that they got (`h2o`,
`tova`, `snapkv`, `defensivekv`, `epicache`) or by their place (`streaming_llm`); their argument attention is one row's
and layer's, float64 [num_q_heads, queries, tokens], each query's weights over the tokens that it sees.
"""
