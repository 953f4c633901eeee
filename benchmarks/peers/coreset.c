/* Greedy k-center over rows that were rotated to their principal axes: the same picks as the plain loop, sooner, because
 * most rows are given up after the first 16 numbers.
 *
 * head: (n, 16), tail: (n, rest), rest a multiple of 16; float32, row by row. picks: (count,), the first one is start.
 * Returns 0, or -1 without memory.
 */
#include <float.h>
#include <stdlib.h>

enum { BLOCK = 16 };

static float squared(const float *a, const float *b) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < BLOCK; j++) sum += (a[j] - b[j]) * (a[j] - b[j]);
    return sum;
}

int greedy_picks(const float *head, const float *tail, long n, long rest, long count, long start, long *picks) {
    float *nearest = malloc(n * sizeof(float)); /* squared distance of each row to the nearest pick */
    if (!nearest) return -1;
    for (long i = 0; i < n; i++) nearest[i] = FLT_MAX;
    long pick = start;
    picks[0] = pick;
    for (long k = 1; k < count; k++) {
        const float *pick_head = head + pick * BLOCK, *pick_tail = tail + pick * rest;
        float farthest = -1;
        long next = 0;
#pragma omp parallel
        {
            float mine = -1;
            long my_row = 0;
#pragma omp for schedule(static) nowait
            for (long i = 0; i < n; i++) {
                float known = nearest[i], sum = squared(head + i * BLOCK, pick_head);
                for (long j = 0; j < rest && sum < known; j += BLOCK) sum += squared(tail + i * rest + j, pick_tail + j);
                if (sum < known) nearest[i] = known = sum;
                if (known > mine) mine = known, my_row = i;
            }
#pragma omp critical
            if (mine > farthest || (mine == farthest && my_row < next)) farthest = mine, next = my_row;
        }
        pick = next;
        nearest[pick] = 0;
        picks[k] = pick;
    }
    free(nearest);
    return 0;
}
