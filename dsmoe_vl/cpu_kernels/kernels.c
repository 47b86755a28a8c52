// What PyTorch composes of many passes over memory on a CPU, each in one pass: float32, rows one after another.
// `operators.py` has the tensors' side; the formulas are written there and at each function.

#include <string.h>

#include "numbers.h"

enum { BLOCK = 64 };  // rows whose sums are added up before they are added to the others: a long sum loses digits
enum { HEAD = 512 };  // widest head

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// out = silu(gate) * up. Rows of gate and up begin `stride` numbers apart.
void swiglu(const float *restrict gate, const float *restrict up, int64_t stride, float *restrict out, int64_t rows,
            int64_t width) {
    for (int64_t row = 0; row < rows; row++, gate += stride, up += stride, out += width)
        for (int64_t i = 0; i < width; i++) out[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

// The gradients of gate and up, whose rows begin `to` numbers apart.
void swiglu_gradients(const float *restrict grad, const float *restrict gate, const float *restrict up, int64_t stride,
                      float *restrict grad_gate, float *restrict grad_up, int64_t to, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; row++, grad += width, gate += stride, up += stride, grad_gate += to, grad_up += to)
        for (int64_t i = 0; i < width; i++) {
            float share = sigmoid(gate[i]), silu = gate[i] * share;
            grad_up[i] = grad[i] * silu;
            grad_gate[i] = grad[i] * up[i] * (share + silu * (1.0f - share));
        }
}

// As swiglu_gradients of `silu(gate) * up * scale[row]`, and hidden, that value, in the place of grad, and the gradient
// of scale.
void scaled_swiglu_gradients(float *restrict grad, const float *restrict gate, const float *restrict up,
                             const float *restrict scale, float *restrict grad_gate, float *restrict grad_up,
                             float *restrict grad_scale, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; row++, grad += width, gate += width, up += width, grad_gate += width,
                 grad_up += width) {
        float of_row = scale[row], sum = 0.0f;
        for (int64_t i = 0; i < width; i++) {
            float share = sigmoid(gate[i]), silu = gate[i] * share, hidden = silu * up[i], scaled = grad[i] * of_row;
            sum += grad[i] * hidden;
            grad_up[i] = scaled * silu;
            grad_gate[i] = scaled * up[i] * (share + silu * (1.0f - share));
            grad[i] = hidden * of_row;
        }
        grad_scale[row] = sum;
    }
}

static inline float inverse_root(const float *restrict x, int64_t width, float eps) {
    float sum = 0.0f;
    for (int64_t i = 0; i < width; i++) sum += x[i] * x[i];
    return 1.0f / sqrtf(sum / width + eps);
}

// out = x * inverse * weight, inverse = 1 / sqrt(mean(x^2) + eps), kept for each row.
void rms_norm(const float *restrict x, const float *restrict weight, float *restrict out, float *restrict inverse,
              int64_t rows, int64_t width, float eps) {
    for (int64_t row = 0; row < rows; row++, x += width, out += width) {
        float by = inverse[row] = inverse_root(x, width, eps);
        for (int64_t i = 0; i < width; i++) out[i] = x[i] * by * weight[i];
    }
}

// With n = x * inverse: grad_x = inverse (g w - n mean(g w n)); adds g n to `sums`, and over all rows to grad_weight.
static inline void norm_gradients(const float *restrict grad, const float *restrict x, const float *restrict weight,
                                  float inverse, float *restrict grad_x, float *restrict sums, int64_t width) {
    float projection = 0.0f;
    for (int64_t i = 0; i < width; i++) {
        float product = grad[i] * x[i] * inverse;
        sums[i] += product;
        projection += product * weight[i];
    }
    float along = projection / width * inverse;
    for (int64_t i = 0; i < width; i++) grad_x[i] = inverse * (grad[i] * weight[i] - x[i] * along);
}

// `sums` is room for `width` numbers.
void rms_norm_gradients(const float *restrict grad, const float *restrict x, const float *restrict weight,
                        const float *restrict inverse, float *restrict grad_x, float *restrict grad_weight,
                        float *restrict sums, int64_t rows, int64_t width) {
    memset(grad_weight, 0, width * sizeof(float));
    for (int64_t begin = 0; begin < rows; begin += BLOCK) {
        memset(sums, 0, width * sizeof(float));
        for (int64_t row = begin; row < least(begin + BLOCK, rows); row++)
            norm_gradients(grad + row * width, x + row * width, weight, inverse[row], grad_x + row * width, sums, width);
        for (int64_t i = 0; i < width; i++) grad_weight[i] += sums[i];
    }
}

// x [rows, queries + 2 keys, width]: queries and keys are normalised, with weights of their own, and turned: each pair
// of neighbours is a complex number, multiplied by that of `turn` [rows, width / 2, 2]. Values are copied. Without
// weights nothing is normalised.
void heads(const float *restrict x, const float *restrict q_weight, const float *restrict k_weight,
           const float *restrict turn, float *restrict out, float *restrict inverse, int64_t rows, int64_t queries,
           int64_t keys, int64_t width, float eps) {
    float normalised[HEAD];
    for (int64_t row = 0; row < rows; row++, turn += width) {
        for (int64_t head = 0; head < queries + keys; head++, x += width, out += width) {
            const float *weight = head < queries ? q_weight : k_weight, *from = x;
            if (weight) {
                float by = *inverse++ = inverse_root(x, width, eps);
                for (int64_t i = 0; i < width; i++) normalised[i] = x[i] * by * weight[i];
                from = normalised;
            }
            for (int64_t i = 0; i < width; i += 2) {
                out[i] = from[i] * turn[i] - from[i + 1] * turn[i + 1];
                out[i + 1] = from[i] * turn[i + 1] + from[i + 1] * turn[i];
            }
        }
        memcpy(out, x, keys * width * sizeof(float));
        x += keys * width;
        out += keys * width;
    }
}

// The reverse of `heads`: turned back, then as norm_gradients. `sums` is room for 2 * width numbers; those of queries
// come first, there and in grad_weights.
void heads_gradients(const float *restrict grad, const float *restrict x, const float *restrict q_weight,
                     const float *restrict k_weight, const float *restrict turn, const float *restrict inverse,
                     float *restrict grad_x, float *restrict grad_weights, float *restrict sums, int64_t rows,
                     int64_t queries, int64_t keys, int64_t width) {
    float back[HEAD];
    if (q_weight) memset(grad_weights, 0, 2 * width * sizeof(float));
    for (int64_t begin = 0; begin < rows; begin += BLOCK) {
        if (q_weight) memset(sums, 0, 2 * width * sizeof(float));
        for (int64_t row = begin; row < least(begin + BLOCK, rows); row++, turn += width) {
            for (int64_t head = 0; head < queries + keys; head++, grad += width, grad_x += width) {
                const float *weight = head < queries ? q_weight : k_weight;
                float *to = weight ? back : grad_x;
                for (int64_t i = 0; i < width; i += 2) {
                    to[i] = grad[i] * turn[i] + grad[i + 1] * turn[i + 1];
                    to[i + 1] = grad[i + 1] * turn[i] - grad[i] * turn[i + 1];
                }
                if (weight) {
                    norm_gradients(back, x, weight, *inverse++, grad_x, sums + (head < queries ? 0 : width), width);
                    x += width;
                }
            }
            memcpy(grad_x, grad, keys * width * sizeof(float));
            grad += keys * width;
            grad_x += keys * width;
            if (q_weight) x += keys * width;
        }
        if (q_weight)
            for (int64_t i = 0; i < 2 * width; i++) grad_weights[i] += sums[i];
    }
}
