/* The hot lines of pcb.py and of the counting in kernels.py, fused so that a block is walked through once while it lies in the cache.

   Specification: pcb.py. Each function repeats its operations in its order, each rounded on its own (compile with -ffp-contract=off: a fused
   multiply-add would round differently), so that both give the same bits; tests/test_kernels.py holds them together. Nothing here depends on
   the width of the vector unit, so the clones below for newer processors also give the same bits.

   Plain C, called through ctypes: no Python object is touched, and the interpreter lock is free meanwhile. */

#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__gnu_linux__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

enum { STRIP = 512 }; /* elements: with a few tasks, the working set of a strip stays in the first-level cache */

INLINE float as_float(int32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE int32_t as_bits(float x) { int32_t bits; memcpy(&bits, &x, 4); return bits; }

INLINE double as_double(int64_t bits) { double x; memcpy(&x, &bits, 8); return x; }
INLINE int64_t as_bits64(double x) { int64_t bits; memcpy(&bits, &x, 8); return bits; }

INLINE float clamp(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

/* pcb.exp; with `normal` for x >= -80 only, where the power of two needs no second factor (the bits are the same). */
INLINE float exp_(float x, int normal) {
    if (!normal) x = x < -104.0f ? -104.0f : x;
    /* Adding and subtracting 1.5 * 2^23 rounds to the nearest even integer, as torch.round does, on any vector unit. */
    float k = (x * 0x1.715476p+0f + 12582912.0f) - 12582912.0f;
    float r = (x - k * 0x1.62e000p-1f) - k * 0x1.0bfbe8p-15f;
    float q = 0x1.6a23d0p-10f;
    q = q * r + 0x1.123a20p-7f;
    q = q * r + 0x1.5558f2p-5f;
    q = q * r + 0x1.555492p-3f;
    q = q * r + 0x1.fffffcp-2f;
    float result = ((r * r) * q + r) + 1.0f;
    int32_t n = (int32_t)k, half = n >> 1;
    if (normal) return result * as_float((n + 127) << 23);
    return result * as_float((half + 127) << 23) * as_float((n - half + 127) << 23);
}

/* pcb.exp in float64; -708 <= x <= 1, which the scores of up to 700 tasks are, needs no second factor. */
INLINE double exp64(double x) {
    double k = (x * 0x1.71547652b82fep+0 + 0x1.8p52) - 0x1.8p52;
    double r = (x - k * 0x1.62e42fefa0000p-1) - k * 0x1.cf79abc9e3b3ap-40;
    double q = 0x1.1e3d06ff62840p-29;
    q = q * r + 0x1.af6c1db77d1aap-26;
    q = q * r + 0x1.27e5b493405efp-22;
    q = q * r + 0x1.71ddf00282b2ap-19;
    q = q * r + 0x1.a01a01364e078p-16;
    q = q * r + 0x1.a01a01b38a16dp-13;
    q = q * r + 0x1.6c16c16c305ddp-10;
    q = q * r + 0x1.111111110ec3fp-7;
    q = q * r + 0x1.5555555555503p-5;
    q = q * r + 0x1.555555555555bp-3;
    q = q * r + 0x1.0000000000000p-1;
    return (((r * r) * q + r) + 1.0) * as_double(((int64_t)(int32_t)k + 1023) << 52);
}

/* pcb.tanh_unit */
INLINE float tanh_unit(float x) {
    float s = x * x;
    float q = -0x1.77dd4ep-12f;
    q = q * s + 0x1.2da504p-9f;
    q = q * s + -0x1.0460c8p-7f;
    q = q * s + 0x1.600994p-6f;
    q = q * s + -0x1.b96222p-5f;
    q = q * s + 0x1.110be2p-3f;
    q = q * s + -0x1.55553cp-2f;
    return ((q * s) * x) + x;
}

/* pcb.tanh */
INLINE float tanh_(float x) {
    float size = fabsf(x);
    float bounded = size > 10.0f ? 10.0f : size;
    float tail = copysignf(1.0f - 2.0f / (exp_(bounded * 2.0f, 1) + 1.0f), x);
    float near = tanh_unit(clamp(x, -1.0f, 1.0f));
    return size <= 1.0f ? near : tail;
}

INLINE float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f; }

typedef struct {
    int64_t n;         /* tasks */
    int64_t stride;    /* elements from one row of an [n, B] array to the next */
    int64_t pairwise;  /* 1: pairwise, 0: released */
    const float *low, *high, *range; /* [n]; range = high - low, or infinity */
    const float *t, *span;           /* [n]; span = max beta - t, or infinity; unused for beta */
    float *scratch;                  /* [2 n, STRIP] */
} Scores;

/* beta of m <= STRIP elements from `at` on, into scratch rows n .. 2n-1. */
INLINE void beta_strip_(const Scores *s, const float *tau, int64_t at, int64_t m, const int few) {
    const int64_t n = s->n;
    const float tasks = (float)n;
    float *u = s->scratch, *inter = s->scratch + n * STRIP;
    if (s->pairwise) {
        for (int64_t i = 0; i < n; i++) {
            const float low = s->low[i], high = s->high[i], range = s->range[i];
            const float *restrict x = tau + i * s->stride + at;
            float *restrict ui = u + i * STRIP, *restrict acc = inter + i * STRIP;
            for (int64_t b = 0; b < m; b++) {
                ui[b] = sign(x[b]) * ((clamp(fabsf(x[b]), low, high) - low) / range);
                acc[b] = 0.0f;
            }
        }
        for (int64_t i = 0; i < n; i++) {
            const float *restrict ui = u + i * STRIP;
            float *restrict acc_i = inter + i * STRIP;
            for (int64_t b = 0; b < m; b++) acc_i[b] += tanh_unit(ui[b] * ui[b]);
            for (int64_t j = i + 1; j < n; j++) {
                const float *restrict uj = u + j * STRIP;
                float *restrict acc_j = inter + j * STRIP;
                for (int64_t b = 0; b < m; b++) {
                    float pair = tanh_unit(ui[b] * uj[b]);
                    acc_i[b] += pair;
                    acc_j[b] += pair;
                }
            }
        }
        for (int64_t i = 0; i < n; i++) {
            const float *restrict ui = u + i * STRIP;
            float *restrict acc = inter + i * STRIP;
            for (int64_t b = 0; b < m; b++) acc[b] = acc[b] * exp_((ui[b] * ui[b] - 1.0f) * tasks, few);
        }
    } else {
        float *restrict total = u;
        for (int64_t b = 0; b < m; b++) total[b] = tau[at + b];
        for (int64_t i = 1; i < n; i++) {
            const float *restrict x = tau + i * s->stride + at;
            for (int64_t b = 0; b < m; b++) total[b] += x[b];
        }
        for (int64_t i = 0; i < n; i++) {
            const float low = s->low[i], high = s->high[i], range = s->range[i];
            const float *restrict x = tau + i * s->stride + at;
            float *restrict acc = inter + i * STRIP;
            int32_t largest = 0; /* as bits: an integer maximum vectorises, one of floats does not */
            for (int64_t b = 0; b < m; b++) {
                acc[b] = x[b] * total[b];
                int32_t size = as_bits(acc[b]) & 0x7fffffff;
                largest = size > largest ? size : largest;
            }
            if (largest <= as_bits(1.0f)) /* nearly always: task vectors are small */
                for (int64_t b = 0; b < m; b++) acc[b] = tanh_unit(acc[b]);
            else
                for (int64_t b = 0; b < m; b++) acc[b] = tanh_(acc[b]);
            for (int64_t b = 0; b < m; b++) {
                float z = (clamp(fabsf(x[b]), low, high) - low) / range;
                acc[b] = acc[b] * exp_((z * z - 1.0f) * tasks, few);
            }
        }
    }
}

INLINE void beta_strip(const Scores *s, const float *tau, int64_t at, int64_t m) {
    if (s->n <= 80)
        beta_strip_(s, tau, at, m, 1);
    else
        beta_strip_(s, tau, at, m, 0);
}

/* pcb.beta_released and pcb.beta_pairwise: tau [n, B] -> beta [n, B] (same row stride). */
EXPORT CLONES void pcb_beta(const Scores *s, const float *tau, int64_t B, float *beta) {
    for (int64_t at = 0; at < B; at += STRIP) {
        const int64_t m = B - at < STRIP ? B - at : STRIP;
        beta_strip(s, tau, at, m);
        for (int64_t i = 0; i < s->n; i++) memcpy(beta + i * s->stride + at, s->scratch + (s->n + i) * STRIP, (size_t)m * 4);
    }
}

/* pcb.scale_of and pcb.combine after pcb_beta: theta [B], tau [n, B] -> merged [B]. */
EXPORT CLONES void pcb_merge(const Scores *s, const float *theta, const float *tau, int64_t B, const float *lambdas, float lambda, float floor_, float *merged) {
    float total[STRIP], sum[STRIP];
    for (int64_t at = 0; at < B; at += STRIP) {
        const int64_t m = B - at < STRIP ? B - at : STRIP;
        beta_strip(s, tau, at, m);
        for (int64_t i = 0; i < s->n; i++) {
            const float low = s->low[i], high = s->high[i], t = s->t[i], span = s->span[i], weight = lambdas[i];
            const float *restrict x = tau + i * s->stride + at, *restrict beta = s->scratch + (s->n + i) * STRIP;
            if (i == 0)
                for (int64_t b = 0; b < m; b++) {
                    float scale = ((beta[b] < t ? t : beta[b]) - t) / span;
                    total[b] = scale;
                    sum[b] = (scale * weight) * (sign(x[b]) * clamp(fabsf(x[b]), low, high));
                }
            else
                for (int64_t b = 0; b < m; b++) {
                    float scale = ((beta[b] < t ? t : beta[b]) - t) / span;
                    total[b] += scale;
                    sum[b] += (scale * weight) * (sign(x[b]) * clamp(fabsf(x[b]), low, high));
                }
        }
        const float *restrict base = theta + at;
        float *restrict out = merged + at;
        for (int64_t b = 0; b < m; b++) {
            float value = (sum[b] * lambda) / (total[b] < floor_ ? floor_ : total[b]) + base[b];
            out[b] = total[b] > 0.0f ? value : base[b];
        }
    }
}

/* pcb.ties: theta [B], tau [n, B] -> merged [B]; low [n] is the smallest |tau| that is kept. */
EXPORT CLONES void pcb_ties(const float *theta, const float *tau, int64_t n, int64_t stride, int64_t B, const float *low, const float *lambdas, float lambda, float *merged) {
    float elected[STRIP], sum[STRIP], count[STRIP];
    for (int64_t at = 0; at < B; at += STRIP) {
        const int64_t m = B - at < STRIP ? B - at : STRIP;
        for (int64_t b = 0; b < m; b++) elected[b] = sum[b] = count[b] = 0.0f;
        for (int64_t i = 0; i < n; i++) {
            const float *restrict x = tau + i * stride + at;
            const float least = low[i];
            for (int64_t b = 0; b < m; b++) elected[b] += fabsf(x[b]) >= least ? x[b] : 0.0f;
        }
        for (int64_t i = 0; i < n; i++) {
            const float *restrict x = tau + i * stride + at;
            const float least = low[i], weight = lambdas[i];
            for (int64_t b = 0; b < m; b++) {
                float agrees = elected[b] >= 0.0f ? x[b] : -x[b]; /* positive if x is not 0 and has the elected sign */
                int agree = (fabsf(x[b]) >= least) & (agrees > 0.0f);
                float term = agree ? x[b] * weight : 0.0f;
                sum[b] = i == 0 ? term : sum[b] + term; /* not 0 + term, which would turn a first -0 into +0 */
                count[b] += agree ? 1.0f : 0.0f;
            }
        }
        for (int64_t b = 0; b < m; b++) {
            float value = (sum[b] / (count[b] < 1.0f ? 1.0f : count[b])) * lambda + theta[at + b];
            merged[at + b] = count[b] > 0.0f ? value : theta[at + b];
        }
    }
}

/* min and max of tau_i tau_j for each pair i <= j, row by row: tau [n, B]; low and high are updated. */
EXPORT CLONES void pcb_extrema(const float *tau, int64_t n, int64_t stride, int64_t B, double *low, double *high) {
    for (int64_t i = 0, p = 0; i < n; i++)
        for (int64_t j = i; j < n; j++, p++) {
            const float *restrict x = tau + i * stride, *restrict y = tau + j * stride;
            double least[16], most[16]; /* lanes: a running minimum of doubles alone would not vectorise */
            for (int l = 0; l < 16; l++) least[l] = low[p], most[l] = high[p];
            int64_t b = 0;
            for (; b + 16 <= B; b += 16)
                for (int l = 0; l < 16; l++) {
                    double product = (double)x[b + l] * (double)y[b + l];
                    least[l] = product < least[l] ? product : least[l];
                    most[l] = product > most[l] ? product : most[l];
                }
            for (; b < B; b++) {
                double product = (double)x[b] * (double)y[b];
                least[0] = product < least[0] ? product : least[0];
                most[0] = product > most[0] ? product : most[0];
            }
            for (int l = 0; l < 16; l++) {
                low[p] = least[l] < low[p] ? least[l] : low[p];
                high[p] = most[l] > high[p] ? most[l] : high[p];
            }
        }
}

/* pcb.paper_exponentials: tau [n, B] -> intra [n, B] and pair [n (n + 1) / 2, B], both with row stride `stride`. range: high - low, or infinity. */
EXPORT CLONES void pcb_paper_exponentials(const float *tau, int64_t n, int64_t stride, int64_t B, const double *low, const double *range, double *intra, double *pair) {
    const double tasks = (double)n;
    for (int64_t i = 0, p = 0; i < n; i++)
        for (int64_t j = i; j < n; j++, p++) {
            const float *restrict x = tau + i * stride, *restrict y = tau + j * stride;
            double *restrict e = pair + p * stride;
            for (int64_t b = 0; b < B; b++) e[b] = exp64(((double)x[b] * (double)y[b] - low[p]) / range[p] - 1.0);
            if (i == j) {
                double *restrict own = intra + i * stride;
                for (int64_t b = 0; b < B; b++) own[b] = exp64((((double)x[b] * (double)x[b] - low[p]) / range[p] - 1.0) * tasks);
            }
        }
}

/* pcb.beta_paper: tau [n, B] -> beta [n, B], with D / (softmax denominator) of each task and of each pair. */
EXPORT CLONES void pcb_beta_paper(const float *tau, int64_t n, int64_t stride, int64_t B, const double *low, const double *range, const double *intra_factor, const double *pair_factor, double *beta) {
    const double tasks = (double)n;
    for (int64_t at = 0; at < B; at += STRIP) {
        const int64_t m = B - at < STRIP ? B - at : STRIP;
        for (int64_t i = 0; i < n; i++)
            for (int64_t b = 0; b < m; b++) beta[i * stride + at + b] = 0.0;
        for (int64_t i = 0, p = 0; i < n; i++)
            for (int64_t j = i; j < n; j++, p++) {
                const float *restrict x = tau + i * stride + at, *restrict y = tau + j * stride + at;
                double e[STRIP];
                for (int64_t b = 0; b < m; b++) e[b] = exp64(((double)x[b] * (double)y[b] - low[p]) / range[p] - 1.0) * pair_factor[p];
                for (int64_t b = 0; b < m; b++) beta[i * stride + at + b] += e[b];
                if (j != i)
                    for (int64_t b = 0; b < m; b++) beta[j * stride + at + b] += e[b];
            }
        for (int64_t i = 0, p = 0; i < n; p += n - i, i++) {
            const float *restrict x = tau + i * stride + at;
            double *restrict out = beta + i * stride + at;
            for (int64_t b = 0; b < m; b++) {
                double own = exp64((((double)x[b] * (double)x[b] - low[p]) / range[p] - 1.0) * tasks);
                out[b] = out[b] * (own * intra_factor[i]);
            }
        }
    }
}

/* x - theta in float32, x bfloat16. */
EXPORT CLONES void pcb_tau_bfloat16(const uint16_t *restrict x, const float *restrict theta, int64_t B, float *restrict tau) {
    for (int64_t b = 0; b < B; b++) tau[b] = as_float((int32_t)((uint32_t)x[b] << 16)) - theta[b];
}

/* x rounded to bfloat16, nearest, ties to even; not 0 if any result is infinite or not a number. */
EXPORT CLONES int64_t pcb_round_bfloat16(const float *restrict x, int64_t B, uint16_t *restrict out) {
    uint32_t bad = 0;
    for (int64_t b = 0; b < B; b++) {
        uint32_t bits = (uint32_t)as_bits(x[b]);
        uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        bad |= (uint32_t)((bits & 0x7f800000u) == 0x7f800000u) | (uint32_t)((rounded & 0x7f80u) == 0x7f80u);
        out[b] = (uint16_t)rounded;
    }
    return (int64_t)bad;
}

typedef struct {
    int64_t lo, hi;
    int64_t below_lo, upto_lo, below_hi, upto_hi; /* counts of keys */
    void *inside;                                 /* keys strictly between, room for B */
    int64_t found;                                /* how many */
} Bracket;

INLINE int32_t key32(float x, int magnitude) {
    int32_t bits = as_bits(x), size = bits & 0x7fffffff;
    return magnitude || bits >= 0 ? size : -size;
}

INLINE int64_t key64(double x, int magnitude) {
    int64_t bits = as_bits64(x), size = bits & 0x7fffffffffffffff;
    return magnitude || bits >= 0 ? size : -size;
}

/* Counts the keys of x (of |x|, if magnitude) against each bracket, and returns the largest key. Keys are integers that order float values
   (kernels.keys): of 32 bits for float, of 64 for double. The counts are added to what the brackets hold. */
#define DEFINE_COUNT(NAME, FLOAT, INT, KEY, SMALLEST)                                                        \
    INLINE INT NAME##_strip(const FLOAT *restrict x, int32_t m, int magnitude, Bracket *bracket) {           \
        const INT lo = (INT)bracket->lo, hi = (INT)bracket->hi;                                              \
        INT below_lo = 0, upto_lo = 0, below_hi = 0, upto_hi = 0, largest = SMALLEST;                        \
        for (int32_t b = 0; b < m; b++) {                                                                    \
            INT key = KEY(x[b], magnitude);                                                                  \
            below_lo += key < lo;                                                                            \
            upto_lo += key <= lo;                                                                            \
            below_hi += key < hi;                                                                            \
            upto_hi += key <= hi;                                                                            \
            largest = key > largest ? key : largest;                                                         \
        }                                                                                                    \
        bracket->below_lo += below_lo;                                                                       \
        bracket->upto_lo += upto_lo;                                                                         \
        bracket->below_hi += below_hi;                                                                       \
        bracket->upto_hi += upto_hi;                                                                         \
        if (below_hi > upto_lo) {                                                                            \
            INT *inside = (INT *)bracket->inside + bracket->found;                                           \
            uint64_t hits[STRIP / 8]; /* a byte per element; few are inside, so most words are 0 and skipped */ \
            uint8_t *hit = (uint8_t *)hits;                                                                  \
            memset(hits, 0, sizeof hits);                                                                    \
            for (int32_t b = 0; b < m; b++) {                                                                \
                INT key = KEY(x[b], magnitude);                                                              \
                hit[b] = (uint8_t)((key > lo) & (key < hi));                                                 \
            }                                                                                                \
            for (int32_t w = 0; w < STRIP / 8; w++)                                                          \
                if (hits[w])                                                                                 \
                    for (int32_t b = 8 * w; b < 8 * w + 8; b++)                                              \
                        if (hit[b]) *inside++ = KEY(x[b], magnitude);                                        \
            bracket->found = inside - (INT *)bracket->inside;                                                \
        }                                                                                                    \
        return largest;                                                                                      \
    }                                                                                                        \
    EXPORT CLONES int64_t NAME(const FLOAT *x, int64_t B, int64_t magnitude, Bracket *brackets, int64_t count) { \
        INT largest = SMALLEST;                                                                              \
        for (int64_t at = 0; at < B; at += STRIP) {                                                          \
            const int32_t m = (int32_t)(B - at < STRIP ? B - at : STRIP);                                    \
            for (int64_t k = 0; k < count; k++) {                                                            \
                INT top = magnitude ? NAME##_strip(x + at, m, 1, brackets + k) : NAME##_strip(x + at, m, 0, brackets + k); \
                largest = top > largest ? top : largest;                                                     \
            }                                                                                                \
        }                                                                                                    \
        return largest;                                                                                      \
    }

DEFINE_COUNT(pcb_count32, float, int32_t, key32, INT32_MIN)
DEFINE_COUNT(pcb_count64, double, int64_t, key64, INT64_MIN)

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", "Native kernels of pcb_ray, called through ctypes.", -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
