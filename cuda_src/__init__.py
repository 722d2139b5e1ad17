"""CUDA C++ sources of PersistentKV. `gpu.kernels` is the only reader, and compiles one .cu file for each kernel.

What to read, in this order:
1. variant.cuh     every compile-time constant of every kernel, with what it means and who sets it
2. arguments.cuh   what the host gives the kernels
3. plan.cuh        the balanced schedule: how a step's tiles are laid end to end and cut into ranges of equal cost
4. balanced.cu     the kernel that most steps run; its header says what it computes and what bounds it
5. attend.cuh      the one decode path, of every schedule: attend() is the main loop
   under it, in the order in which a tile passes through them:
   paged_load.cuh (page ids, copies to shared memory; table.cuh looks ids up), ring.cuh (who waits for what),
   fragments.cuh (bytes to operands), query.cuh (logits), weights.cuh (online softmax), state.cuh (partial states)
6. early_plan.cuh  how a plan is made while the previous kernel still runs, with a timeline; warp_plan.cuh does its sums
7. parts.cuh       how heads that ranges cut are put together again, inside the kernel
8. shared.cu       the same for rows that begin alike: what they have in common is read once for all of them
   spans.cuh (the schedule's arithmetic), warp_spans.cuh (by a warp), width.cuh (two widths of the decode path),
   shared_step.cuh (what a CTA does), shared_parts.cuh (where states go and how members are merged); balanced_step.cuh
   is the plain step of both kernels; prefixes.cu and prefix_groups.cuh find such rows; group_reads.cuh: reads by
   warpgroups of sm_90 (wgmma.cuh)
9. decode.cu and merge.cu, the paper's two schedules over the same attend(): a list of tasks, then a merge
10. selected.cu    the same for listed pages (lists.cuh, list_plan.cuh); select.cu makes the lists (page_scores.cuh,
   page_weights.cuh, top_pages.cuh; coded_scores.cuh of 8-bit summaries, centroid_scores.cuh of
   centroids) from what summaries.cu keeps of pages (centroid_summaries.cuh, centroid_teams.cuh);
   page_lse.cuh is the mass of tiles as a by-product
11. several.cu     the same over several GPUs: inbox.cuh sends states to the ranks that own the outputs and merges them,
   several_step.cuh is a rank's step
Beside these: append.cu (new tokens into pages; quantize.cuh, vectors.cuh), plan.cu and plan_spans.cu (list the balanced
schedules for tests), stream.cu (the speed of light), mma.cuh (the instructions everything is made of), read_early.cuh
(one load), gather.cu (pages from and to host memory), block_sums.cu (by which blocks of disks are known again),
product.cu (matrix products of few rows, for gpu.serve), rows.cu (norms, gates and the likeliest token beside them).

How data flows in a decode step: a CTA finds its range -> its segments (a run of tiles of one row and KV head) -> tiles,
dealt to its warps' streams -> page ids -> cp.async into each stream's ring -> ldmatrix -> S^T = K Q^T -> weights -> O^T
+= V^T P^T in registers -> at a segment's end the warps' states to shared memory, merged by column -> the output, or, of
cut heads, slots in global memory that the CTA of the head's last part waits for and merges.

The CPU tests compile these very files: tests/support/decode_harness.cpp runs the kernels in fibers, with instructions
of its own in place of mma.cuh. tests/kernels/code_size.py shows what an edit does to registers and code.
"""
