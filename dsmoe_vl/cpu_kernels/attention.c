// Attention inside the segments of packed rows: softmax(q k^T / sqrt(width)) v, float32, segment by segment and head by
// head, so that what a head needs stays in the cache. x is [rows, queries + 2 keys, width]: queries, keys and values of
// a token side by side. Segment i has the rows from bounds[i] to bounds[i + 1]. `operators.py` has the tensors' side.

#include <float.h>
#include <stdlib.h>
#include <string.h>

#include "numbers.h"

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
typedef float vector __attribute__((vector_size(LANES * 4)));
typedef float anywhere __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

enum { TILE = 2 * LANES };  // columns of a tile of a product,
enum { HIGH = 6 };          // and its rows: all sums stay in registers
enum { TURN = 48 };         // queries at a time

static int64_t longest_of(const int32_t *bounds, int64_t segments) {
    int64_t longest = 1;
    for (int64_t i = 0; i < segments; i++)
        if (bounds[i + 1] - bounds[i] > longest) longest = bounds[i + 1] - bounds[i];
    return longest;
}

// Room for so many numbers, a multiple of TILE, where a cache line begins.
static float *room_for(int64_t numbers) { return aligned_alloc(64, numbers * sizeof(float)); }

static inline int64_t padded(int64_t n) { return (n + TILE - 1) / TILE * TILE; }

// One tile of `product`, of `high` rows, which is a constant wherever this is called.
static inline __attribute__((always_inline)) void tile(const float *restrict a, int64_t down, int64_t along,
                                                       const float *restrict b, int64_t depth, float *restrict c,
                                                       int64_t to, int adds, const int high) {
    vector left[HIGH], right[HIGH];
    for (int r = 0; r < high; r++) left[r] = right[r] = (vector){0};
    for (int64_t k = 0; k < depth; k++, a += along, b += TILE) {
        vector first = *(const anywhere *)b, second = *(const anywhere *)(b + LANES);
        for (int r = 0; r < high; r++) {
            float factor = a[r * down];
            left[r] += factor * first;
            right[r] += factor * second;
        }
    }
    for (int r = 0; r < high; r++, c += to) {
        anywhere *one = (anywhere *)c, *two = (anywhere *)(c + LANES);
        if (adds) left[r] += *one, right[r] += *two;
        *one = left[r], *two = right[r];
    }
}

// c [rows, columns] = a [rows, depth] b [depth, columns], or added to it. Neighbours in a are `down` and `along` numbers
// apart, rows of c `to`. b stands in panels of TILE columns, `panel` numbers apart, so that it is read in order.
static void product(const float *restrict a, int64_t down, int64_t along, const float *restrict b, int64_t panel,
                    int64_t depth, float *restrict c, int64_t to, int64_t rows, int64_t columns, int adds) {
    for (int64_t column = 0; column < columns; column += TILE, b += panel) {
        int64_t row = 0;
        for (; row + HIGH <= rows; row += HIGH)
            tile(a + row * down, down, along, b, depth, c + row * to + column, to, adds, HIGH);
        const float *rest = a + row * down;
        float *out = c + row * to + column;
        switch (rows - row) {
            case 5: tile(rest, down, along, b, depth, out, to, adds, 5); break;
            case 4: tile(rest, down, along, b, depth, out, to, adds, 4); break;
            case 3: tile(rest, down, along, b, depth, out, to, adds, 3); break;
            case 2: tile(rest, down, along, b, depth, out, to, adds, 2); break;
            case 1: tile(rest, down, along, b, depth, out, to, adds, 1); break;
        }
    }
}

// Rows that are `apart` numbers apart, in panels [columns / TILE, rows, TILE], filled up with zeros.
static void panels(const float *restrict from, int64_t apart, float *restrict to, int64_t rows, int64_t width) {
    int64_t column = 0;
    for (; column + TILE <= width; column += TILE)
        for (int64_t row = 0; row < rows; row++, to += TILE) memcpy(to, from + row * apart + column, TILE * sizeof(float));
    if (column == width) return;
    memset(to, 0, rows * TILE * sizeof(float));
    for (int64_t row = 0; row < rows; row++, to += TILE)
        for (int64_t i = column; i < width; i++) to[i - column] = from[row * apart + i];
}

// The same of the rows transposed: [rows / TILE, width, TILE].
static void turned_panels(const float *restrict from, int64_t apart, float *restrict to, int64_t rows, int64_t width) {
    for (int64_t first = 0; first < rows; first += TILE, to += width * TILE) {
        int64_t real = least(TILE, rows - first);
        if (real < TILE) memset(to, 0, width * TILE * sizeof(float));
        for (int64_t row = 0; row < real; row++, from += apart)
            for (int64_t i = 0; i < width; i++) to[i * TILE + row] = from[i];
    }
}

static void scattered(const float *restrict from, int64_t wide, float *restrict to, int64_t apart, int64_t rows,
                      int64_t width) {
    for (int64_t row = 0; row < rows; row++, from += wide, to += apart) memcpy(to, from, width * sizeof(float));
}

static float largest(const float *restrict x, int64_t n) {
    float top = -FLT_MAX, tops[LANES];
    int64_t i = 0;
    for (int lane = 0; lane < LANES; lane++) tops[lane] = top;
    for (; i + LANES <= n; i += LANES)
        for (int lane = 0; lane < LANES; lane++) tops[lane] = x[i + lane] > tops[lane] ? x[i + lane] : tops[lane];
    for (; i < n; i++) top = x[i] > top ? x[i] : top;
    for (int lane = 0; lane < LANES; lane++) top = tops[lane] > top ? tops[lane] : top;
    return top;
}

// out [rows, queries, width]; logs [rows, queries]: logarithms of the sums of exponentials, for the gradients. Returns
// 0, or 1 without memory.
int32_t attention(const float *restrict x, const int32_t *restrict bounds, float *restrict out, float *restrict logs,
              int64_t segments, int64_t queries, int64_t keys, int64_t width, int32_t causal) {
    int64_t longest = longest_of(bounds, segments), most = padded(longest), wide = padded(width);
    int64_t apart = (queries + 2 * keys) * width, shared = queries / keys;
    float scale = 1.0f / sqrtf((float)width);
    float *room = room_for(width * most + longest * wide + TURN * (most + wide));
    if (!room) return 1;
    float *k_turned = room, *v = k_turned + width * most, *scores = v + longest * wide, *result = scores + TURN * most;
    for (int64_t segment = 0; segment < segments; segment++) {
        int64_t begin = bounds[segment], rows = bounds[segment + 1] - begin;
        for (int64_t key = 0; key < keys; key++) {
            const float *of_keys = x + begin * apart + (queries + key) * width;
            turned_panels(of_keys, apart, k_turned, rows, width);
            panels(of_keys + keys * width, apart, v, rows, width);
            for (int64_t head = key * shared; head < (key + 1) * shared; head++)
                for (int64_t first = 0; first < rows; first += TURN) {
                    int64_t now = least(TURN, rows - first), seen = causal ? first + now : rows;
                    const float *q = x + (begin + first) * apart + head * width;
                    product(q, apart, 1, k_turned, width * TILE, width, scores, most, now, padded(seen), 0);
                    for (int64_t row = 0; row < now; row++) {
                        float *score = scores + row * most, sum = 0.0f;
                        int64_t last = causal ? first + row + 1 : rows;
                        float top = largest(score, last);
                        for (int64_t i = 0; i < last; i++) {
                            score[i] = exponential((score[i] - top) * scale);
                            sum += score[i];
                        }
                        float share = 1.0f / sum;
                        for (int64_t i = 0; i < last; i++) score[i] *= share;
                        for (int64_t i = last; i < seen; i++) score[i] = 0.0f;
                        logs[(begin + first + row) * queries + head] = top * scale + logf(sum);
                    }
                    product(scores, most, 1, v, rows * TILE, seen, result, wide, now, wide, 0);
                    scattered(result, wide, out + ((begin + first) * queries + head) * width, queries * width, now, width);
                }
        }
    }
    free(room);
    return 0;
}

// With p the softmax and g the gradient of the result: the gradient of p is r = g v^T, that of the scores
// s = p (r - sum(p r)), of q s k, of k s^T q, of v p^T g (Dao et al. 2022, appendix B).
int32_t attention_gradients(const float *restrict grad, const float *restrict x, const int32_t *restrict bounds,
                        const float *restrict logs, float *restrict grad_x, int64_t segments, int64_t queries,
                        int64_t keys, int64_t width, int32_t causal) {
    int64_t longest = longest_of(bounds, segments), most = padded(longest), wide = padded(width);
    int64_t apart = (queries + 2 * keys) * width, shared = queries / keys;
    float scale = 1.0f / sqrtf((float)width);
    float *room = room_for(2 * width * most + 3 * longest * wide + TURN * (2 * most + 3 * wide));
    if (!room) return 1;
    float *k_turned = room, *v_turned = k_turned + width * most, *k = v_turned + width * most;
    float *grad_k = k + longest * wide, *grad_v = grad_k + longest * wide, *shares = grad_v + longest * wide;
    float *slopes = shares + TURN * most, *q = slopes + TURN * most, *g = q + TURN * wide, *grad_q = g + TURN * wide;
    for (int64_t segment = 0; segment < segments; segment++) {
        int64_t begin = bounds[segment], rows = bounds[segment + 1] - begin;
        for (int64_t key = 0; key < keys; key++) {
            int64_t place = begin * apart + (queries + key) * width;
            turned_panels(x + place, apart, k_turned, rows, width);
            turned_panels(x + place + keys * width, apart, v_turned, rows, width);
            panels(x + place, apart, k, rows, width);
            memset(grad_k, 0, rows * wide * sizeof(float));
            memset(grad_v, 0, rows * wide * sizeof(float));
            for (int64_t head = key * shared; head < (key + 1) * shared; head++)
                for (int64_t first = 0; first < rows; first += TURN) {
                    int64_t now = least(TURN, rows - first), seen = causal ? first + now : rows;
                    const float *of_grad = grad + ((begin + first) * queries + head) * width;
                    int64_t query = (begin + first) * apart + head * width;
                    panels(x + query, apart, q, now, width);
                    panels(of_grad, queries * width, g, now, width);
                    product(x + query, apart, 1, k_turned, width * TILE, width, shares, most, now, padded(seen), 0);
                    product(of_grad, queries * width, 1, v_turned, width * TILE, width, slopes, most, now, padded(seen), 0);
                    for (int64_t row = 0; row < now; row++) {
                        float *share = shares + row * most, *slope = slopes + row * most, sum = 0.0f;
                        float log = logs[(begin + first + row) * queries + head];
                        int64_t last = causal ? first + row + 1 : rows;
                        for (int64_t i = 0; i < last; i++) {
                            share[i] = exponential(share[i] * scale - log);
                            sum += share[i] * slope[i];
                        }
                        for (int64_t i = 0; i < last; i++) slope[i] = share[i] * (slope[i] - sum) * scale;
                        for (int64_t i = last; i < seen; i++) share[i] = slope[i] = 0.0f;
                    }
                    product(slopes, most, 1, k, rows * TILE, seen, grad_q, wide, now, wide, 0);
                    scattered(grad_q, wide, grad_x + query, apart, now, width);
                    product(slopes, 1, most, q, now * TILE, now, grad_k, wide, seen, wide, 1);
                    product(shares, 1, most, g, now * TILE, now, grad_v, wide, seen, wide, 1);
                }
            scattered(grad_k, wide, grad_x + place, apart, rows, width);
            scattered(grad_v, wide, grad_x + place + keys * width, apart, rows, width);
        }
    }
    free(room);
    return 0;
}
