// What the kernels share.

#include <math.h>
#include <stdint.h>

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// exp(x) to about 1e-7: x = r ln 2 + f, a polynomial in f (coefficients of Cephes' expf), and r as the exponent.
static inline float exponential(float x) {
    x = x > 88.0f ? 88.0f : (x < -87.0f ? -87.0f : x);
    float r = rintf(x * 1.44269504f);
    float f = x - r * 0.693359375f;
    f = f + r * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    union { int32_t bits; float value; } power = {.bits = ((int32_t)r + 127) << 23};
    return p * power.value;
}
